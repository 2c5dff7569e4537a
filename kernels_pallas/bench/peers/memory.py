"""Norm, MLP and loss baselines in JAX for `bench`; peers/__init__.py describes how the comparison is kept fair.

`xla_default` is the operation as a user writes it, in the dtype of the inputs; the package's reference computes in
float32. `products` is a yardstick: the matrix products of an MLP alone, without the activation.
"""

import importlib.util

import jax
import jax.numpy as jnp

from ... import backend


def no_reason(*arrays, **static) -> None:
    """None: the baseline runs everywhere."""


def tokamax_unsupported(*arrays, **static) -> str | None:
    """The reason why tokamax cannot run here, or None."""
    del arrays, static
    if importlib.util.find_spec("tokamax") is None:
        return "needs tokamax: pip install -e '.[peers]'"
    platform = backend.target().platform
    return None if platform == "gpu" else f"tokamax's kernels need a GPU, got {backend.target().kind}"


def tokamax_norm(x, scale, shift, weight, *, kind, eps):
    """tokamax's Triton norm kernel, followed by the modulation in XLA."""
    from tokamax import layer_norm  # pyright: ignore[reportMissingImports]

    y = layer_norm(x, weight, None, epsilon=eps, subtract_mean=kind == "layer", implementation="triton")
    if scale is not None:
        y = y * (1 + _by_token(scale, x.dtype))
    return y if shift is None else y + _by_token(shift, x.dtype)


def tokamax_residual_norm(x, branch, gate, scale, shift, weight, *, kind, eps):
    """The residual sum in XLA, followed by tokamax's norm."""
    x_new = x + _by_token(gate, x.dtype) * branch
    return x_new, tokamax_norm(x_new, scale, shift, weight, kind=kind, eps=eps)


def tokamax_mlp(x, w_gate_up, w_down, *, activation):
    """tokamax's gated linear unit (its Mosaic kernel, else its Triton kernel), followed by a product."""
    from tokamax import gated_linear_unit  # pyright: ignore[reportMissingImports]

    function = _activation(activation)
    return gated_linear_unit(x, w_gate_up, activation=function, implementation=("mosaic", "triton")) @ w_down


def default_gated_mlp(x, w_gate_up, w_down, *, activation):
    """Two products by cuBLAS with the gated activation fused by XLA."""
    both = x @ w_gate_up.reshape(x.shape[1], -1)
    gate, up = jnp.split(both, 2, axis=-1)
    return (_activation(activation)(gate) * up) @ w_down


def default_dense_mlp(x, w_up, b_up, w_down, b_down, *, activation):
    """Two products by cuBLAS with bias and activation fused by XLA."""
    return _activation(activation)(x @ w_up + b_up[None]) @ w_down + b_down[None]


def gated_products(x, w_gate_up, w_down, *, activation):
    """The matrix products of a gated MLP, without the activation."""
    del activation
    return (x @ w_gate_up.reshape(x.shape[1], -1))[:, : w_down.shape[0]] @ w_down


def dense_products(x, w_up, b_up, w_down, b_down, *, activation):
    """The matrix products of an MLP, without bias and activation."""
    del b_up, b_down, activation
    return (x @ w_up) @ w_down


def default_loss(x, w, labels, *, ignore_index, z_loss, logit_softcap):
    """Cross-entropy from materialised logits: the product in the dtype of x, the loss in float32."""
    logits = (x @ w).astype(jnp.float32)
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    counts = labels != ignore_index
    of_label = jnp.take_along_axis(logits, jnp.where(counts, labels, 0)[:, None], axis=1)[:, 0]
    return jnp.where(counts, lse - of_label + z_loss * jnp.square(lse), 0.0), lse


def _by_token(modulation, dtype):
    return (modulation if modulation.ndim == 3 else modulation[:, None]).astype(dtype)


def _activation(name: str):
    return jax.nn.silu if name == "silu" else jax.nn.gelu  # the tanh form by default
