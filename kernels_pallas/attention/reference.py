"""The definition of attention, in float32; what every kernel is held to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool,
    scale: float | None,
) -> Float[Array, "B T N H"]:
    """out = softmax(scale q k^T + mask) v, all scores at once.

    Source: Attention Is All You Need, https://arxiv.org/abs/1706.03762, equation 1.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q.reshape(B, T, K, N // K, H), k, v))
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btkgh,bskh->bkgts", q32, k32, precision=highest) * (H**-0.5 if scale is None else scale)
    if causal:
        seen = jnp.arange(S)[None, :] <= jnp.arange(T)[:, None] + (S - T)
        scores = jnp.where(seen[None, None, None], scores, -jnp.inf)
    # A finite floor under the maximum: a row that sees nothing then weighs exp(-inf - floor) = 0, not nan.
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v32, precision=highest)
    return out.reshape(q.shape).astype(q.dtype)
