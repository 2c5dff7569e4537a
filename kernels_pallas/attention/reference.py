"""The definition of attention, in float32; what every kernel is held to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .mask import AttentionMask


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask | None,
    sinks: Float[Array, " N"] | None,
    *,
    scale: float | None,
    softcap: float | None,
    return_lse: bool,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """out = softmax(scale q k^T, masked) v, all scores at once; lse = log(sum(exp(scores))).

    Source: Attention Is All You Need, https://arxiv.org/abs/1706.03762, equation 1.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q.reshape(B, T, K, N // K, H), k, v))
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btkgh,bskh->btkgs", q32, k32, precision=highest).reshape(B, T, N, S)
    scores = scores * (H**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        scores = jnp.where(mask.dense()[:, :, None, :], scores, -jnp.inf)
    # A finite floor under the maximum: a row that sees nothing then weighs exp(-inf - floor) = 0, not nan.
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    if sinks is not None:
        top = jnp.maximum(top, sinks.astype(jnp.float32)[None, None, :, None])
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(jnp.float32)[None, None, :, None] - top)
    some = jnp.where(total == 0, 1, total)
    weights = (weights / some).reshape(B, T, K, N // K, S)
    out = jnp.einsum("btkgs,bskh->btkgh", weights, v32, precision=highest).reshape(q.shape).astype(q.dtype)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(some))[..., 0]
    return (out, lse) if return_lse else out
