"""Sharding: the device mesh (data parallel, FSDP, expert and tensor parallel) and the rules from dims to mesh axes.

Models are written for one device. They name the dims of their parameters ("D K . H") and activations ("B T D"); RULES
says which mesh axes shard which dim. A kernel is a custom call that XLA cannot partition: XLA would all-gather its
arguments first. Kernels are therefore called through `on_mesh`, a shard_map that passes each device its own shards.
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

Dims = str | tuple[str, ...]  # dims of one array, or of each of several

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
        """The axis sizes, with -1 resolved; raises UserError if their product cannot be `num_devices`."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        given = math.prod(n for n in sizes.values() if n != -1)
        shape = ", ".join(f"{axis}={n}" for axis, n in sizes.items())
        if list(sizes.values()).count(-1) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
            raise UserError(f"mesh: got {shape}; wanted positive sizes, at most one of them -1.")
        if -1 in sizes.values():
            sizes = {axis: num_devices // given if n == -1 else n for axis, n in sizes.items()}
        if math.prod(sizes.values()) != num_devices:
            raise UserError(f"mesh: {shape} does not use exactly the {num_devices} available devices.")
        return sizes


def make_mesh(config: MeshConfig, devices: np.ndarray | None = None) -> jax.sharding.Mesh:
    """The mesh of all devices, or of `devices` (which may be compile-only), with Auto axes."""
    devices = np.array(jax.devices() if devices is None else devices)
    sizes = config.resolve(devices.size)
    return jax.sharding.Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))


def spec(dims: str, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> jax.P:
    """The PartitionSpec of an array with these dims: "D F" -> P("fsdp", "tensor").

    A mesh axis shards at most one dim of an array, the first whose rule has it: in "B T D" the batch is sharded over
    fsdp, so D is not.
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
    """Inside a vmap over examples: the batch is that of one example, and no mesh axis shards it."""
    token = _one_example.set(True)
    try:
        yield
    finally:
        _one_example.reset(token)


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """Constrains the sharding of an activation by its dims on the current mesh; does nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, spec(dims, mesh))


def on_mesh(function: Callable, in_dims: tuple[Dims, ...], out_dims: Dims) -> Callable:
    """shard_map of `function` by dims: `on_mesh(norm, ("B T .", "B .", "B ."), "B T .")(x, scale, shift)`.

    An argument or a result may be a tree of arrays whose first dims are the given ones.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _shards(mesh):
        return function
    return jax.shard_map(
        function,
        in_specs=jax.tree.map(lambda dims: spec(dims, mesh), in_dims),
        out_specs=jax.tree.map(lambda dims: spec(dims, mesh), out_dims),
        check_vma=False,  # the outputs of kernels have no varying-axes information
    )


def piece_start(cut: jax.P, piece: tuple[int, ...]) -> Int[Array, " dims"]:
    """Inside shard_map: the start index, in each dim, of this device's shard of shape `piece` in the whole array."""
    entries = (*cut, *[None] * (len(piece) - len(cut)))
    index = [0 if axes is None else jax.lax.axis_index(axes) for axes in entries]
    return jnp.stack([jnp.int32(at * size) for at, size in zip(index, piece, strict=True)])


def sharded_by(dim: str, axis: str) -> bool:
    """Whether `axis` of the current mesh shards `dim`."""
    return axis in RULES.get(dim, ()) and axis_size(axis) > 1


def summed(part: jax.Array, dims: str | tuple[str, ...]) -> jax.Array:
    """Inside `on_mesh`: sums per-device parts over the axes that shard the batch (psum or reduce-scatter).

    Each device gets its own shard, by `dims`, of the sum. Dims sharded over "tensor" are shards already.
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
    """The sharding of each leaf: parameters and optimizer moments by their dims, all other leaves replicated."""

    def of_variable(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(jax.NamedSharding(mesh, spec(whole_dims(variable), mesh)))

    def of_leaf(leaf):
        return of_variable(leaf) if isinstance(leaf, nnx.Variable) else jax.NamedSharding(mesh, jax.P())

    return jax.tree.map(of_leaf, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def whole_dims(variable: nnx.Variable) -> str:
    """The dims of a parameter, with a leading "L" for stacked layers."""
    dims = variable.get_metadata()["dims"]
    if variable.ndim == len(dims.split()) + 1:
        dims = f"L {dims}"
    assert variable.ndim == len(dims.split()), (dims, variable.shape)
    return dims


def batch_pieces(sizes: Mapping[str, int]) -> int:
    """Number of shards of the batch on a mesh of these axis sizes; B must be a multiple of it."""
    return 1 if _one_example.get() else math.prod(sizes.get(axis, 1) for axis in RULES["B"])


def whole_batch(num: int, multiple: int) -> int:
    """`num` rounded up so that each device of the current mesh gets equally many images, a multiple of `multiple`."""
    unit = batch_pieces(jax.sharding.get_abstract_mesh().shape) * multiple
    return -(-num // unit) * unit


def axis_size(axis: str) -> int:
    """Size of an axis of the current mesh; 1 if there is no such axis or no mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def _shards(mesh: jax.sharding.AbstractMesh) -> bool:
    return any(size > 1 for size in mesh.shape.values())
