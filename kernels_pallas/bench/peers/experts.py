"""Grouped GEMM and MoE MLP baselines for `bench`; peers/__init__.py describes how the comparison is kept fair.

`ragged_dot` is JAX's grouped product, which XLA lowers. `dense` is a yardstick: one dense matrix product, or one gated
MLP, of as many flops. It shows the speed of cuBLAS on the same work without experts. Its result differs from the op's
and is not checked.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from ... import backend
from .. import timing


def no_reason(*arrays, **static) -> None:
    """None: the baseline runs everywhere."""


def tokamax_unsupported(*arrays) -> str | None:
    """The reason why tokamax cannot run here, or None."""
    del arrays
    if importlib.util.find_spec("tokamax") is None:
        return "needs tokamax: pip install -e '.[peers]'"
    platform = backend.target().platform
    return None if platform == "gpu" else f"tokamax's kernels need a GPU, got {backend.target().kind}"


def ragged_dot(x, w, group_sizes):
    """JAX's grouped product, in the dtype of the inputs."""
    return jax.lax.ragged_dot(x, w, group_sizes)


def tokamax(x, w, group_sizes, *, implementation):
    """One of tokamax's kernels, called by name because tokamax falls back to XLA silently."""
    from tokamax import ragged_dot  # pyright: ignore[reportMissingImports]

    return ragged_dot(x, w, group_sizes, implementation=implementation)


def dense(x, w, group_sizes):
    """All rows times the first expert's matrix."""
    del group_sizes
    return x @ w[0]


def mlp(x, routing, w_gate_up, w_down, *, product):
    """The MoE MLP as a user of a grouped product writes it: gather, two products, and a scatter-add."""
    rows = x[routing.row_index]
    gate, up = jnp.split(product(rows, w_gate_up, routing.group_sizes), 2, axis=-1)
    y = product(jax.nn.silu(gate) * up, w_down, routing.group_sizes)
    weighted = y.astype(jnp.float32) * routing.row_weight[:, None]
    return jax.ops.segment_sum(weighted, routing.row_index, x.shape[0]).astype(x.dtype)


def dense_mlp(x, routing, w_gate_up, w_down):
    """The MLP of the first expert on all rows, without gather and scatter."""
    rows = jnp.resize(x, (routing.row_index.shape[0], x.shape[1]))
    gate, up = jnp.split(rows @ w_gate_up[0], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ w_down[0]


def call(function):
    """The `call` of a baseline that runs `function`."""
    return lambda pass_, copies: timing.call(function, pass_, copies)


PRODUCTS = {
    "ragged_dot": ragged_dot,
    "tokamax_mosaic": functools.partial(tokamax, implementation="mosaic"),
    "tokamax_triton": functools.partial(tokamax, implementation="triton"),
}
