"""Reference implementation of attention in float32 jnp; all kernels are tested against it.

NaN and inf in hidden keys or in other queries do not reach a query, nor their gradients: products are of arrays without
them, and a query that sees one, or has one itself, gets NaN. Only the cotangent of the output is as it comes.
"""

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
    seen = None if mask is None else mask.dense()[:, :, None, :]
    scores = _scores(q, k, seen, scale, softcap)
    # A finite lower bound of the maximum: without visible keys the weights are exp(-inf - bound) = 0, not NaN.
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    if sinks is not None:
        top = jnp.maximum(top, sinks.astype(jnp.float32)[None, None, :, None])
    top = jax.lax.stop_gradient(top)
    weights = _hidden(jnp.exp(scores - top), seen)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(jnp.float32)[None, None, :, None] - top)
    some = jnp.where(total == 0, 1, total)
    out = _weighted(_hidden(weights / some, seen), v, seen).astype(q.dtype)
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
    seen = None if mask is None else mask.dense()[:, :, None, :]
    scores = lambda q, k: _scores(q, k, seen, scale, softcap)
    score, t_score = jax.jvp(scores, (q, k), (t_q, t_k))
    weights = _hidden(jnp.exp(jnp.minimum(score - jnp.where(lse == -jnp.inf, 0, lse)[..., None], 0)), seen)
    t_weights = _hidden(weights * t_score, seen)
    mean = jnp.sum(t_weights, axis=-1, keepdims=True)
    t_out = _weighted(t_weights, v, seen) + _weighted(weights, t_v, seen) - mean * out.astype(jnp.float32)
    return t_out.astype(q.dtype)


def _scores(q, k, seen, scale, softcap):
    """(B, T, N, S) in float32, -inf where the mask hides a key."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
    if seen is not None:
        nan = _nan(q32)[..., None] + jnp.repeat(jnp.swapaxes(_nan(k32), 1, 2)[:, None], N // K, axis=2)
        q32, k32 = _finite(q32), _finite(k32)
    q32 = q32.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->btkgs", q32, k32, precision=jax.lax.Precision.HIGHEST).reshape(B, T, N, S)
    scores = scores * (H**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return scores if seen is None else jnp.where(seen, scores + nan, -jnp.inf)


def _weighted(weights, v, seen):
    """Weighted sums of the values with (B, T, N, S) weights: (B, T, N, H) in float32."""
    B, T, N, S = weights.shape
    K, H = v.shape[2:]
    grouped, v32 = weights.reshape(B, T, K, N // K, S), v.astype(jnp.float32)
    values = v32 if seen is None else _finite(v32)
    out = jnp.einsum("btkgs,bskh->btkgh", grouped, values, precision=jax.lax.Precision.HIGHEST).reshape(B, T, N, H)
    if seen is None:
        return out
    # The weight of each visible value with NaN or inf, times NaN, so that its gradient is NaN too.
    bad = seen & jnp.isnan(jnp.repeat(jnp.swapaxes(_nan(v32), 1, 2)[:, None], N // K, axis=2))
    nan = jnp.where(jnp.any(bad, axis=-1), jnp.array(jnp.nan, v32.dtype), 0)
    out = out + (jnp.sum(jnp.where(bad, weights, 0), axis=-1) * nan)[..., None]
    return jnp.where(jnp.any(seen, axis=-1)[..., None], out, 0)  # what no key is visible to has no gradient


def _hidden(x, seen):
    """x, (B, T, N, S), with 0 where the mask hides a key."""
    return x if seen is None else jnp.where(seen, x, 0)


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


def _nan(x):
    """(B, L, heads): NaN where one of the H numbers is NaN or inf, else 0."""
    return jnp.where(jnp.all(jnp.isfinite(x), axis=-1), 0, jnp.array(jnp.nan, x.dtype))
