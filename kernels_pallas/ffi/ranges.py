"""Names for phases inside one jitted step, as Nsight Systems shows them: NVTX ranges around what the GPU is given.

A range is two custom calls: one that an argument passes on its way in, and one that the results pass on their way out.
The first hands a token to the second, which hands one to those of the backward pass, so that all of them are in a
program, in order, or none: whatever JAX and XLA leave out of it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType

from .. import backend
from . import custom_calls


PUSH, POP = "range_push", "range_pop"
Arrays = tuple[jax.Array, ...]


def profile_range[**P, Out](name: str, function: Callable[P, Out]) -> Callable[P, Out]:
    """`function`, shown by Nsight Systems as a range of this name, and its backward pass as "<name> backward".

    The range opens when the first array among the arguments is there, and closes when the results are: those are kept
    in memory, not fused across, and what depends on neither may run elsewhere. Arrays stay sharded as they are. Give
    ranges of the same array names of their own. A range is of the thread that launches kernels, so steps inside are
    kept out of CUDA graphs. There is no forward-mode derivative, no second one, and no vmap over an explicitly sharded
    axis. On anything but an NVIDIA GPU, and where the custom calls are not built, this is `function`.
    """

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> Out:
        if backend.target().platform != "gpu" or custom_calls.why_not() is not None:
            return function(*args, **kwargs)
        arrays, whole = _arrays_in((args, kwargs))
        if not arrays:
            return function(*args, **kwargs)
        opened: Any = _opened(name, *arrays)
        args, kwargs = whole(opened[:-1])
        results, whole = _arrays_in(function(*args, **kwargs))
        return whole(_closed(name, opened[-1], *results))

    return named


def _arrays_in(tree: Any) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Any]]:
    """The tree's arrays that have bytes, and what makes a tree with others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and leaf.size and _of_bytes(leaf.dtype)]

    def whole(arrays: Sequence[jax.Array]) -> Any:
        others = dict(zip(places, arrays, strict=True))
        return jax.tree.unflatten(structure, [others.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in places], whole


def _of_bytes(dtype: Any) -> bool:
    """Not of random keys, nor of numbers that share a byte."""
    return not jnp.issubdtype(dtype, jax.dtypes.extended) and jax.dtypes.itemsize_bits(dtype) % 8 == 0


# ----------------------------------------------------------------------------------------------------------- two ends
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _opened(name: str, *arrays: jax.Array) -> Arrays:
    """The arguments as they are, and a token.

    The first alone passes the call: of the others, as weights that the program may not write, there would be copies.
    """
    first, token = _call(PUSH, name, arrays[:1], jnp.zeros(()))
    return *first, *arrays[1:], token


def _opened_forward(name: str, *arrays: Any):
    wanted = tuple(() if array.perturbed else None for array in arrays)  # structure alone
    return _opened(name, *(array.value for array in arrays)), wanted


def _opened_backward(name: str, wanted: tuple, d_out: tuple):
    """Closes the backward's range, if `_closed` opened one, when the gradients that are wanted are there."""
    *d_arrays, token = d_out
    if isinstance(token, SymbolicZero):
        return tuple(map(_known, d_arrays))
    wanted_alone = [d if mark is not None else None for d, mark in zip(d_arrays, wanted, strict=True)]
    return _through(POP, name, wanted_alone, token)[:-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _closed(name: str, token: jax.Array, *arrays: jax.Array) -> Arrays:
    """The results as they are."""
    return _call(POP, name, arrays, token)[0]


def _closed_forward(name: str, token: Any, *arrays: Any):
    out, after = _call(POP, name, tuple(array.value for array in arrays), token.value)
    return out, (after, () if token.perturbed else None)


def _closed_backward(name: str, residuals: tuple, d_out: tuple):
    """Opens the backward's range, which a gradient of an argument will close; at once where none is wanted."""
    token, of_arguments = residuals
    *d_arrays, after = _through(PUSH, name, d_out, token)
    if of_arguments is None:
        *d_arrays, after = _through(POP, name, d_arrays, after)
    return after, *d_arrays


def _through(call: str, name: str, d_arrays: Any, token: jax.Array) -> tuple:
    """Cotangents after a call of the backward's, and the token it gave; None where one is zero."""
    d_arrays = list(map(_known, d_arrays))
    places = [i for i, d in enumerate(d_arrays) if d is not None]
    passed, after = _call(call, f"{name} backward", tuple(d_arrays[i] for i in places), token)
    for place, array in zip(places, passed, strict=True):
        d_arrays[place] = array
    return *d_arrays, after


def _known(d: Any) -> Any:
    """None for what is zero by construction, as of integers."""
    return None if d is None or isinstance(d, SymbolicZero) or d.dtype == jax.dtypes.float0 else d


_opened.defvjp(_opened_forward, _opened_backward, symbolic_zeros=True)
_closed.defvjp(_closed_forward, _closed_backward, symbolic_zeros=True)


# ----------------------------------------------------------------------------------------------------------- the call
def _call(call: str, name: str, arrays: Arrays, token: jax.Array) -> tuple[Arrays, jax.Array]:
    """One end of a range at these arrays: (they, a token); of a batch, one end."""

    @custom_vmap
    def run(arrays, token):
        *passed, after = _of_explicit_axes(functools.partial(_partitioned, call, name), (*arrays, token))
        return tuple(passed), after

    @run.def_vmap
    def of_batch(_, batched, arrays, token):
        return _call(call, name, arrays, token[0] if batched[1] else token), (batched[0], False)

    return run(arrays, token)


def _of_explicit_axes(function: Callable[..., Arrays], arrays: Arrays) -> Arrays:
    """function(*arrays), on each device's own pieces over those axes of the mesh that types tell of."""
    mesh = jax.typeof(arrays[0]).sharding.mesh
    axes = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not axes:
        return function(*arrays)
    specs = tuple(jax.typeof(array).sharding.spec for array in arrays)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs, axis_names=axes, check_vma=False)(
        *arrays
    )


def _of_a_device(call: str, name: str, *arrays: jax.Array) -> Arrays:
    """The custom call; the last array is the token."""
    # XLA would merge calls that are the same, but for the side effect; and but for the barriers it would put a copy of
    # a call into what slices an array before it, or stores one after it, in a loop.
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    arrays = jax.lax.optimization_barrier(arrays)
    aliases = {i: i for i in range(len(arrays) - 1)}
    out = custom_calls.call(call, outs, *arrays, aliases=aliases, has_side_effect=True, name=name)
    return jax.lax.optimization_barrier(tuple(out))


def _partition(call: str, name: str, mesh: jax.sharding.Mesh, arrays: Any, _: Any):
    shardings = tuple(array.sharding for array in arrays)
    return mesh, functools.partial(_of_a_device, call, name), shardings, shardings


def _rule(_call: str, _name: str, _mesh: Any, operands: Any, _results: Any) -> str:
    """Every result is sharded as its operand."""
    each = ", ".join(" ".join(f"d{i}_{k}" for k in range(len(x.shape))) for i, x in enumerate(operands))
    return f"{each} -> {each}"


# On each device's own pieces over those axes of the mesh that XLA shards.
_partitioned = custom_partitioning(_of_a_device, static_argnums=(0, 1))
_partitioned.def_partition(partition=_partition, sharding_rule=_rule)
