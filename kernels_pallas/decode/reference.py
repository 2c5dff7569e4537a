"""Reference implementation of decode attention in float32 jnp, and its gradient; kernels are tested against it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def decode_attention(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K H"],
    lengths: Int[Array, " B"],
    *,
    scale: float | None,
    softcap: float | None,
) -> Float[Array, "B N H"]:
    """out = softmax(scale q k^T) v over the first lengths[b] keys, with all scores in memory; 0 without keys.

    Source: Attention Is All You Need, https://arxiv.org/abs/1706.03762, equation 1.
    """
    B, N, H = q.shape
    S, K = k_cache.shape[1:3]
    exists = jnp.arange(S, dtype=jnp.int32)[None, :] < lengths[:, None]
    # The cache past the length may be NaN, and 0 * NaN is NaN, in the sum and in its gradient: set it to 0.
    k32, v32 = (jnp.where(exists[:, :, None, None], x.astype(jnp.float32), 0) for x in (k_cache, v_cache))
    q32 = q.astype(jnp.float32).reshape(B, K, N // K, H)
    scores = jnp.einsum("bkgh,bskh->bkgs", q32, k32, precision=jax.lax.Precision.HIGHEST)
    scores = scores * (H**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(exists[:, None, None, :], scores, -jnp.inf)
    # A finite lower bound of the maximum: without keys the weights are exp(-inf - bound) = 0, not NaN.
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("bkgs,bskh->bkgh", weights, v32, precision=jax.lax.Precision.HIGHEST)
    return out.reshape(B, N, H).astype(q.dtype)


def paged_decode_attention(
    q: Float[Array, "B N H"],
    k_pages: Float[Array, "P W K H"],
    v_pages: Float[Array, "P W K H"],
    block_table: Int[Array, "B J"],
    lengths: Int[Array, " B"],
    *,
    scale: float | None,
    softcap: float | None,
) -> Float[Array, "B N H"]:
    """`decode_attention` on the concatenated pages of each example."""
    B, J = block_table.shape
    P, W, K, H = k_pages.shape
    page = jnp.clip(block_table, 0, P - 1)  # entries past the length may be any numbers; they are masked
    k_cache, v_cache = (pages[page].reshape(B, J * W, K, H) for pages in (k_pages, v_pages))
    return decode_attention(q, k_cache, v_cache, lengths, scale=scale, softcap=softcap)


def decode_attention_backward(residuals, d_out, **static):
    """d_q, d_k_cache and d_v_cache, by differentiating the reference.

    Training through a KV cache is rare, so there is no backward kernel.
    """
    q, k_cache, v_cache, lengths = residuals
    _, vjp = jax.vjp(lambda q, k, v: decode_attention(q, k, v, lengths, **static), q, k_cache, v_cache)
    return (*vjp(d_out), None)


def paged_decode_attention_backward(residuals, d_out, **static):
    """d_q, d_k_pages and d_v_pages, by differentiating the reference."""
    q, k_pages, v_pages, *integers = residuals
    _, vjp = jax.vjp(lambda q, k, v: paged_decode_attention(q, k, v, *integers, **static), q, k_pages, v_pages)
    return (*vjp(d_out), None, None)
