"""Attention by cuDNN, as JAX calls it: a rival to measure, and the choice where it was measured to be faster.

cuDNN knows full and causal attention; any other mask it gets as the dense T x S tensor, which it reads as a bias.
Whether its backward repeats to the bit is cuDNN's affair: JAX gives no say in it.
"""

import functools

import jax
import jax.numpy as jnp

from .. import backend


def unsupported(q, k, v, mask, sinks, *, scale, softcap, return_lse) -> str | None:
    """Why these arguments cannot run here, or None: the rules of JAX's own check of a training call."""
    del v, scale
    device = backend.target()
    if backend.interpret() or device.platform != "gpu":
        return f"needs an NVIDIA GPU, got {'interpret mode' if backend.interpret() else device.kind}"
    if device.capability is None or device.capability < 8.0:
        return f"needs compute capability 8.0, got {device.capability} ({device.kind})"
    if q.dtype.name not in ("bfloat16", "float16"):
        return f"needs bfloat16 or float16, got {q.dtype}"
    widest = 256 if device.capability >= 9.0 else 128
    if q.shape[-1] % 8 or q.shape[-1] > widest:
        return f"needs a head width that is a multiple of 8 up to {widest}, got {q.shape[-1]}"
    if softcap is not None or sinks is not None or return_lse:
        return "has no soft cap, no sinks, and no gradient of lse"
    if q.shape[1] % 2 or k.shape[1] % 2:  # JAX's vjp counts a bias that is not there, and refuses
        return f"needs even T and S, got {q.shape[1]} and {k.shape[1]}"
    return None


def forward(q, k, v, mask, sinks, *, scale, softcap, return_lse):
    """out, and what JAX's own vjp keeps."""
    del sinks, softcap, return_lse  # `unsupported` has refused them
    return jax.vjp(functools.partial(_attention, mask=mask, scale=scale), q, k, v)


def backward(vjp, d_out, *, scale, softcap, return_lse):
    """d_q, d_k and d_v, by cuDNN."""
    del scale, softcap, return_lse
    return (*vjp(d_out), None, None)


def _attention(q, k, v, *, mask, scale):
    attend = functools.partial(jax.nn.dot_product_attention, q, k, v, scale=scale, implementation="cudnn")
    if mask is None or mask.kind == "full":
        return attend()
    if _own_causal(mask):
        return attend(is_causal=True)
    dense = mask.dense()
    out = attend(mask=dense[:, None])
    # cuDNN gives a query that sees nothing the mean of all values.
    return jnp.where(jnp.any(dense, axis=-1)[:, :, None, None], out, 0)


def _own_causal(mask) -> bool:
    """Whether cuDNN's causal mask is this one; where T and S differ it starts the diagonal elsewhere."""
    return mask.kind == "causal" and mask.num_queries == mask.num_keys
