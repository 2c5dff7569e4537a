"""Names for phases inside one jitted step, as Nsight Systems shows them: NVTX ranges around what the GPU is given."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import backend, custom_calls


def profile_range[**P, Out](name: str, function: Callable[P, Out]) -> Callable[P, Out]:
    """`function`, shown by Nsight Systems as a range of this name, and its backward pass as "<name> backward".

    The range opens when the first array among the arguments is there, and closes when the first of the results is:
    those two are kept in memory, not fused across, and what depends on neither may run elsewhere. A range is
    of the thread that launches kernels, so steps inside are kept out of CUDA graphs. On anything but an NVIDIA GPU, and
    where the custom calls are not built, this is `function`.
    """

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> Out:
        if backend.target().platform != "gpu" or custom_calls.why_not() is not None:
            return function(*args, **kwargs)
        args, kwargs = _first_array(lambda x: _edge("range_push", name, x), (args, kwargs))
        return _first_array(lambda x: _edge("range_pop", name, x), function(*args, **kwargs))

    return named


def _first_array(change: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    at = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)), None)
    if at is not None:
        leaves[at] = change(leaves[at])
    return jax.tree.unflatten(structure, leaves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _edge(call: str, name: str, x: jax.Array) -> jax.Array:
    """x, with one end of a range at it."""
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return custom_calls.call(call, out, x, aliases={0: 0}, vmap_method="broadcast_all", name=name)


def _forward(call: str, name: str, x: jax.Array):
    return _edge(call, name, x), None


def _backward(call: str, name: str, _, d_out: jax.Array):
    if not jnp.issubdtype(d_out.dtype, jnp.inexact):  # of integers: nothing comes back
        return (d_out,)
    return (_edge("range_pop" if call == "range_push" else "range_push", f"{name} backward", d_out),)


_edge.defvjp(_forward, _backward)
