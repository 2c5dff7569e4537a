"""NVTX ranges inside a jitted function, for profiling with Nsight Systems: `profile_range`.

A range is two custom calls: the first passes one argument of the function through and opens the range, the second
passes the results through and closes it. A token goes from the first call to the second, and from there to the two
calls of the backward pass. This dependency keeps the calls in order, and dead-code elimination removes all of them or
none.
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
    """Wraps `function` in an NVTX range of this name; the backward pass gets a range "<name> backward".

    The range opens when the first array argument is available and closes when the results are. The results are kept in
    memory and not fused with what follows; work that depends on neither may be scheduled elsewhere. Arrays keep their
    sharding. Ranges around the same array need different names. NVTX ranges belong to the thread that launches the
    kernels, so steps with ranges are excluded from CUDA graphs. There is no forward-mode derivative, no second
    derivative, and no vmap over an explicitly sharded axis. On anything but an NVIDIA GPU, and if the custom calls are
    not built, the wrapper calls `function` and adds nothing.
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
    """(the non-empty arrays of whole-byte dtype in the tree, a function that rebuilds the tree with other arrays)."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and leaf.size and _of_bytes(leaf.dtype)]

    def whole(arrays: Sequence[jax.Array]) -> Any:
        others = dict(zip(places, arrays, strict=True))
        return jax.tree.unflatten(structure, [others.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in places], whole


def _of_bytes(dtype: Any) -> bool:
    """Whether the elements take whole bytes: false for PRNG keys and for types of fewer than 8 bits."""
    return not jnp.issubdtype(dtype, jax.dtypes.extended) and jax.dtypes.itemsize_bits(dtype) % 8 == 0


# ------------------------------------------------------------------------------------------- opening and closing calls
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _opened(name: str, *arrays: jax.Array) -> Arrays:
    """The arguments unchanged, and a token.

    Only the first argument passes through the call. The others would be copied, for example weights, which the program
    must not overwrite.
    """
    first, token = _call(PUSH, name, arrays[:1], jnp.zeros(()))
    return *first, *arrays[1:], token


def _opened_forward(name: str, *arrays: Any):
    wanted = tuple(() if array.perturbed else None for array in arrays)  # pytree structure without values
    return _opened(name, *(array.value for array in arrays)), wanted


def _opened_backward(name: str, wanted: tuple, d_out: tuple):
    """Closes the range of the backward pass, if `_closed_backward` opened one, after the required gradients."""
    *d_arrays, token = d_out
    if isinstance(token, SymbolicZero):
        return tuple(map(_known, d_arrays))
    wanted_alone = [d if mark is not None else None for d, mark in zip(d_arrays, wanted, strict=True)]
    return _through(POP, name, wanted_alone, token)[:-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _closed(name: str, token: jax.Array, *arrays: jax.Array) -> Arrays:
    """The results unchanged."""
    return _call(POP, name, arrays, token)[0]


def _closed_forward(name: str, token: Any, *arrays: Any):
    out, after = _call(POP, name, tuple(array.value for array in arrays), token.value)
    return out, (after, () if token.perturbed else None)


def _closed_backward(name: str, residuals: tuple, d_out: tuple):
    """Opens the range of the backward pass; closes it at once if no gradient of an argument is required."""
    token, of_arguments = residuals
    *d_arrays, after = _through(PUSH, name, d_out, token)
    if of_arguments is None:
        *d_arrays, after = _through(POP, name, d_arrays, after)
    return after, *d_arrays


def _through(call: str, name: str, d_arrays: Any, token: jax.Array) -> tuple:
    """The cotangents passed through a call of the backward pass, and its token; None for a cotangent that is zero."""
    d_arrays = list(map(_known, d_arrays))
    places = [i for i, d in enumerate(d_arrays) if d is not None]
    passed, after = _call(call, f"{name} backward", tuple(d_arrays[i] for i in places), token)
    for place, array in zip(places, passed, strict=True):
        d_arrays[place] = array
    return *d_arrays, after


def _known(d: Any) -> Any:
    """None for a cotangent that is zero by construction, such as that of an integer; else the cotangent."""
    return None if d is None or isinstance(d, SymbolicZero) or d.dtype == jax.dtypes.float0 else d


_opened.defvjp(_opened_forward, _opened_backward, symbolic_zeros=True)
_closed.defvjp(_closed_forward, _closed_backward, symbolic_zeros=True)


# ---------------------------------------------------------------------------------------------------- the custom calls
def _call(call: str, name: str, arrays: Arrays, token: jax.Array) -> tuple[Arrays, jax.Array]:
    """Opens or closes a range at these arrays and returns (arrays, token); under vmap once for the whole batch."""

    @custom_vmap
    def run(arrays, token):
        *passed, after = _of_explicit_axes(functools.partial(_partitioned, call, name), (*arrays, token))
        return tuple(passed), after

    @run.def_vmap
    def of_batch(_, batched, arrays, token):
        return _call(call, name, arrays, token[0] if batched[1] else token), (batched[0], False)

    return run(arrays, token)


def _of_explicit_axes(function: Callable[..., Arrays], arrays: Arrays) -> Arrays:
    """function(*arrays), in shard_map over the mesh axes of kind Explicit, on each device's shards."""
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
    # The side effect keeps XLA from merging equal calls. The barriers keep it from duplicating a call inside a loop,
    # next to an operation that slices an array before the call or stores one after it.
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    arrays = jax.lax.optimization_barrier(arrays)
    aliases = {i: i for i in range(len(arrays) - 1)}
    out = custom_calls.call(call, outs, *arrays, aliases=aliases, has_side_effect=True, name=name)
    return jax.lax.optimization_barrier(tuple(out))


def _partition(call: str, name: str, mesh: jax.sharding.Mesh, arrays: Any, _: Any):
    shardings = tuple(array.sharding for array in arrays)
    return mesh, functools.partial(_of_a_device, call, name), shardings, shardings


def _rule(_call: str, _name: str, _mesh: Any, operands: Any, _results: Any) -> str:
    """The Shardy rule: every result has the sharding of its operand."""
    each = ", ".join(" ".join(f"d{i}_{k}" for k in range(len(x.shape))) for i, x in enumerate(operands))
    return f"{each} -> {each}"


# Runs the call on each device's shards, for the mesh axes that XLA's partitioner handles.
_partitioned = custom_partitioning(_of_a_device, static_argnums=(0, 1))
_partitioned.def_partition(partition=_partition, sharding_rule=_rule)
