"""Reference implementation of attention in float32 jnp; all kernels are tested against it."""

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
    """out = softmax(scale q k^T, masked) v, with all scores in memory; lse = log(sum(exp(scores))).

    Source: Attention Is All You Need, https://arxiv.org/abs/1706.03762, equation 1.
    """
    scores = _scores(q, k, mask, scale, softcap)
    # A finite lower bound of the maximum: without visible keys the weights are exp(-inf - bound) = 0, not NaN.
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    if sinks is not None:
        top = jnp.maximum(top, sinks.astype(jnp.float32)[None, None, :, None])
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(jnp.float32)[None, None, :, None] - top)
    some = jnp.where(total == 0, 1, total)
    out = _weighted(weights / some, v).astype(q.dtype)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(some))[..., 0]
    return (out, lse) if return_lse else out


def flash_attention_tangent(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask | None,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B T N"],
    t_q: Float[Array, "B T N H"],
    t_k: Float[Array, "B S K H"],
    t_v: Float[Array, "B S K H"],
    *,
    scale: float | None,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """The tangent of `flash_attention`'s output along (t_q, t_k, t_v), given that output and its lse.

    With p = exp(score - lse) and t_score the tangent of the scores,
    t_out = sum_s p (t_score v + t_v) - (sum_s p t_score) out.

    It is linear in the tangents. The other arguments are constants to its gradient.

    Source: sCM, https://arxiv.org/abs/2410.11081, appendix on the Jacobian-vector product of flash attention.
    """
    q, k, v, out, lse = jax.lax.stop_gradient((q, k, v, out, lse))
    scores = lambda q, k: _scores(q, k, mask, scale, softcap)
    score, t_score = jax.jvp(scores, (q, k), (t_q, t_k))
    weights = jnp.exp(score - jnp.where(lse == -jnp.inf, 0, lse)[..., None])
    t_weights = weights * t_score
    mean = jnp.sum(t_weights, axis=-1, keepdims=True)
    t_out = _weighted(t_weights, v) + _weighted(weights, t_v) - mean * out.astype(jnp.float32)
    return t_out.astype(q.dtype)


def _scores(q, k, mask, scale, softcap):
    """(B, T, N, S) in float32, -inf where the mask hides a key."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q32, k32 = q.astype(jnp.float32).reshape(B, T, K, N // K, H), k.astype(jnp.float32)
    scores = jnp.einsum("btkgh,bskh->btkgs", q32, k32, precision=jax.lax.Precision.HIGHEST).reshape(B, T, N, S)
    scores = scores * (H**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return scores if mask is None else jnp.where(mask.dense()[:, :, None, :], scores, -jnp.inf)


def _weighted(weights, v):
    """Weighted sums of the values with (B, T, N, S) weights: (B, T, N, H) in float32."""
    B, T, N, S = weights.shape
    K, H = v.shape[2:]
    grouped = weights.reshape(B, T, K, N // K, S)
    out = jnp.einsum("btkgs,bskh->btkgh", grouped, v.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return out.reshape(B, T, N, H)
