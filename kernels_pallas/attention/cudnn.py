"""cuDNN attention through JAX: a baseline, and the implementation that is chosen where it was measured to be faster.

cuDNN supports full and causal attention. Any other mask is passed as a dense T x S tensor, which cuDNN reads as a bias.
Its backward may differ from run to run; JAX offers no option for a deterministic one.
"""

import functools

import jax
import jax.numpy as jnp

from .. import backend


def unsupported(q, k, v, mask, sinks, *, scale, softcap, return_lse) -> str | None:
    """The reason why these arguments cannot run here, or None. The rules are those of JAX's check for training."""
    del v, scale
    device = backend.target()
    if backend.interpret() or device.platform != "gpu":
        return f"needs an NVIDIA GPU, got {'interpret mode' if backend.interpret() else device.kind}"
    if device.capability is None or device.capability < 8.0:
        return f"needs compute capability 8.0 or higher, got {device.capability} ({device.kind})"
    if q.dtype.name not in ("bfloat16", "float16"):
        return f"needs bfloat16 or float16, got {q.dtype}"
    widest = 256 if device.capability >= 9.0 else 128
    if q.shape[-1] % 8 or q.shape[-1] > widest:
        return f"needs a head width that is a multiple of 8 up to {widest}, got {q.shape[-1]}"
    if softcap is not None or sinks is not None or return_lse:
        return "has no soft cap, no sinks, and no gradient of lse"
    if q.shape[1] % 2 or k.shape[1] % 2:  # JAX's vjp assumes a bias and rejects odd lengths
        return f"needs even T and S, got {q.shape[1]} and {k.shape[1]}"
    return None


def forward(q, k, v, mask, sinks, *, scale, softcap, return_lse):
    """The output, and the vjp function of JAX as the residual."""
    del sinks, softcap, return_lse  # `unsupported` rejects them
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
    # cuDNN returns the mean of all values for a query without visible keys.
    return jnp.where(jnp.any(dense, axis=-1)[:, :, None, None], out, 0)


def _own_causal(mask) -> bool:
    """Whether the mask is cuDNN's causal mask. If T and S differ, cuDNN's diagonal starts elsewhere."""
    return mask.kind == "causal" and mask.num_queries == mask.num_keys
