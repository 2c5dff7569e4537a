"""Where arrays live on the mesh: the mesh, the rules from dims to axes, and the one shard_map wrapper for kernels.

Models are written for one device. They name the dims of what they hold ("D K . H") and of what they compute ("B T
D"); the rules below say which mesh axis shards which dim. A kernel is a custom call that XLA cannot partition: it
would gather the whole array first. So kernels meet a mesh through `on_mesh` alone, which hands each device its own
piece.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dito_jax.dims import AXES
from dito_jax.errors import UserError


RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp", "expert"),
    "D": ("fsdp",),
    "E": ("expert",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
}

Dims = str | tuple[str, ...]  # of an array, or of each of several

_one_example = contextvars.ContextVar("one_example", default=False)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1: all devices that the other axes leave."""

    data: int = -1
    """Devices for data parallelism: the batch is sharded, parameters are replicated; -1: all remaining devices."""
    fsdp: int = 1
    """Devices for FSDP: parameters, optimizer state and batch are sharded."""
    expert: int = 1
    """Devices for expert parallelism: experts and batch are sharded."""
    tensor: int = 1
    """Devices for tensor parallelism: attention heads and feed-forward layers are sharded."""

    def resolve(self, num_devices: int) -> dict[str, int]:
        """Axis sizes whose product is `num_devices`; raises UserError if there are none."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        given = math.prod(n for n in sizes.values() if n != -1)
        shape = ", ".join(f"{axis}={n}" for axis, n in sizes.items())
        if list(sizes.values()).count(-1) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
            raise UserError(f"mesh: got {shape}; wanted positive sizes, at most one of them -1.")
        if -1 in sizes.values():
            sizes = {axis: num_devices // given if n == -1 else n for axis, n in sizes.items()}
        if math.prod(sizes.values()) != num_devices:
            raise UserError(f"mesh: {shape} does not use exactly the {num_devices} devices there are.")
        return sizes


def make_mesh(config: MeshConfig, devices: np.ndarray | None = None) -> jax.sharding.Mesh:
    """A mesh of all devices, or of `devices` (which may be compile-only), with Auto axes."""
    devices = np.array(jax.devices() if devices is None else devices)
    sizes = config.resolve(devices.size)
    return jax.sharding.Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))


def spec(dims: str, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> jax.P:
    """The PartitionSpec of an array with these dims: "D F" -> P("fsdp", "tensor").

    An axis shards one dim of an array at most, the first that claims it: in "B T D" the batch has fsdp, so D is whole.
    """
    free = [axis for axis, size in mesh.shape.items() if size > 1]
    entries = []
    for dim in dims.split():
        axes = tuple(axis for axis in RULES.get(dim, ()) if axis in free)
        free = [axis for axis in free if axis not in axes]
        axes = () if dim == "B" and _one_example.get() else axes
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return jax.P(*entries)


@contextlib.contextmanager
def one_example() -> Iterator[None]:
    """For what is traced inside, under a vmap over examples: the batch is one example's, and no axis shards it."""
    token = _one_example.set(True)
    try:
        yield
    finally:
        _one_example.reset(token)


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """Pins an activation to the mesh in force by its dims; nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, spec(dims, mesh))


def on_mesh(function: Callable, in_dims: tuple[Dims, ...], out_dims: Dims) -> Callable:
    """`function` run on each device's own piece: `on_mesh(norm, ("B T .", "B .", "B ."), "B T .")(x, scale, shift)`.

    An argument or a result may be a tree of arrays that begin with the same dims.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _shards(mesh):
        return function
    return jax.shard_map(
        function,
        in_specs=jax.tree.map(lambda dims: spec(dims, mesh), in_dims),
        out_specs=jax.tree.map(lambda dims: spec(dims, mesh), out_dims),
        check_vma=False,  # a kernel's outputs carry no record of the axes they vary over
    )


def piece_start(cut: jax.P, piece: tuple[int, ...]) -> Int[Array, " dims"]:
    """Inside shard_map: where this device's piece of an array that is cut so begins in the whole, in each dim."""
    entries = (*cut, *[None] * (len(piece) - len(cut)))
    index = [0 if axes is None else jax.lax.axis_index(axes) for axes in entries]
    return jnp.stack([jnp.int32(at * size) for at, size in zip(index, piece, strict=True)])


def sharded_by(dim: str, axis: str) -> bool:
    """Whether that axis of the mesh in force shards such a dim."""
    return axis in RULES.get(dim, ()) and axis_size(axis) > 1


def summed(part: jax.Array, dims: str | tuple[str, ...]) -> jax.Array:
    """Inside `on_mesh`: the sum of the parts that devices with different examples hold, of an array of these dims.

    Each device is left with its own piece of the sum. The dims that "tensor" shards are pieces before it already.
    """
    dims = tuple(dims.split()) if isinstance(dims, str) else dims
    for axis in RULES["B"]:
        if axis_size(axis) == 1:
            continue
        over = next((i for i, dim in enumerate(dims) if axis in RULES.get(dim, ())), None)
        if over is None:
            part = jax.lax.psum(part, axis)
        else:
            part = jax.lax.psum_scatter(part, axis, scatter_dimension=over, tiled=True)
    return part


def shardings[Tree](tree: Tree, mesh: jax.sharding.Mesh) -> Tree:
    """Where each leaf lies: a parameter, and what an optimizer keeps of its shape, by the dims it was made with; the
    rest on every device.
    """

    def of_variable(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(jax.NamedSharding(mesh, spec(whole_dims(variable), mesh)))

    def of_leaf(leaf):
        return of_variable(leaf) if isinstance(leaf, nnx.Variable) else jax.NamedSharding(mesh, jax.P())

    return jax.tree.map(of_leaf, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def whole_dims(variable: nnx.Variable) -> str:
    """The dims of a parameter; those of stacked layers have a leading "L"."""
    dims = variable.get_metadata()["dims"]
    if variable.ndim == len(dims.split()) + 1:
        dims = f"L {dims}"
    assert variable.ndim == len(dims.split()), (dims, variable.shape)
    return dims


def batch_pieces(sizes: Mapping[str, int]) -> int:
    """Into how many pieces a mesh of these axis sizes cuts a batch; B must be a multiple of it."""
    return 1 if _one_example.get() else math.prod(sizes.get(axis, 1) for axis in RULES["B"])


def whole_batch(num: int, multiple: int) -> int:
    """`num` images, or the few more that give each device of the mesh in force as many, a multiple of `multiple`."""
    unit = batch_pieces(jax.sharding.get_abstract_mesh().shape) * multiple
    return -(-num // unit) * unit


def axis_size(axis: str) -> int:
    """Of the mesh in force; 1 where it has no such axis, or there is none."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def _shards(mesh: jax.sharding.AbstractMesh) -> bool:
    return any(size > 1 for size in mesh.shape.values())
