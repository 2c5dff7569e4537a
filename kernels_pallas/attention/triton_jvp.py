"""The forward-mode tangent of flash attention in Pallas-Triton: one additional pass over the key tiles.

The output and lse are given, so no online rescaling is needed: five products per tile and one accumulator. The
transpose of the tangent is the backward of attention, applied to the cotangent of the tangent.

Source: sCM, https://arxiv.org/abs/2410.11081, appendix on the Jacobian-vector product of flash attention.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..pallas.triton import dot, run
from . import cost, triton
from .blocks import blocks_for
from .heads import contained, load, load_row, product, store, zeros
from .programs import key_lists, kv_head_of, program, seen_in, walk
from .scores import LOG2_E, LOWEST, Scores, weights_of


def unsupported(q, k, v, mask, out, lse, t_q, t_k, t_v, *, scale, softcap) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del out, lse, t_q, t_k, t_v
    return triton.unsupported(q, k, v, mask, None, scale=scale, softcap=softcap, return_lse=False)


def forward(q, k, v, mask, out, lse, t_q, t_k, t_v, *, scale, softcap):
    """t_out, and (q, k, v, mask, out, lse) for `backward`."""
    B, T, N, _ = q.shape
    blocks = blocks_for("tangent", q, k, mask)
    lse = jnp.swapaxes(jnp.where(lse == -jnp.inf, LOWEST, lse * LOG2_E), 1, 2)
    [t_out] = run(
        functools.partial(_tangent_kernel, scores=Scores.of(q, scale, softcap), blocks=blocks),
        *(q, k, v, *key_lists(mask, q, k, blocks), out, lse, t_q, t_k, t_v),
        name="flash_attention_tangent_forward",
        programs=pl.cdiv(T, blocks.block_q) * N * B,
        blocks=blocks,
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        work=cost.tangent_forward(q, k, v, cost.without_values(mask), out, lse, t_q, t_k, t_v),
    )
    return t_out, (q, k, v, mask, out, lse)


def backward(residuals, d_t_out, *, scale, softcap):
    """The cotangents of t_q, t_k and t_v."""
    q, k, v, mask, out, lse = residuals
    scores, name = Scores.of(q, scale, softcap), "flash_attention_tangent_backward"
    *d_tangents, _ = triton.gradients(q, k, v, mask, out, lse, d_t_out, None, scores=scores, name=name)
    return (*(None for _ in residuals), *d_tangents)


def _tangent_kernel(
    q_ref, k_ref, v_ref, mask, lists, out_ref, lse_ref, t_q_ref, t_k_ref, t_v_ref, t_out_ref, *, scores, blocks
):
    """t_out = sum_s p (t_score v + t_v) - (sum_s p t_score) out, with p = exp(score - lse)."""
    batch, head, tile_q = program(q_ref, blocks.block_q)
    kv_head, start_q = kv_head_of(head, q_ref, k_ref), tile_q * blocks.block_q
    q = load(q_ref, batch, head, start_q, blocks.block_q)
    t_q = load(t_q_ref, batch, head, start_q, blocks.block_q)
    lse = load_row(lse_ref, batch, head, start=start_q, block=blocks.block_q)

    def step(tile, _, carry, *, masked):
        acc, mean = carry
        start_k = tile * blocks.block_k
        k = load(k_ref, batch, kv_head, start_k, blocks.block_k)
        t_k = load(t_k_ref, batch, kv_head, start_k, blocks.block_k)
        score, tanh = scores(product(q, k))
        weights = weights_of(score, lse[:, None])
        t_score = scores.through(product(t_q, k) + product(q, t_k), tanh) * scores.scale
        t_weights = weights * t_score
        v = load(v_ref, batch, kv_head, start_k, blocks.block_k)
        t_v = load(t_v_ref, batch, kv_head, start_k, blocks.block_k)
        if masked:
            (v, poison), (t_v, t_poison) = contained(v), contained(t_v)
            seen = seen_in(mask, batch, start_q, start_k, blocks)
            weights = jnp.where(seen, weights + t_poison[None, :], 0.0)
            t_weights = jnp.where(seen, t_weights + poison[None, :], 0.0)
        narrow, t_narrow = weights.astype(v_ref.dtype), t_weights.astype(v_ref.dtype)
        acc = tuple(a + dot(t_narrow, x) + dot(narrow, y) for a, x, y in zip(acc, v, t_v, strict=True))
        return acc, mean + jnp.sum(t_weights, axis=1)

    carry = zeros(blocks.block_q, q_ref), jnp.zeros((blocks.block_q,), jnp.float32)
    acc, mean = walk(step, carry, lists, batch, tile_q, k_ref.shape[1] // blocks.block_k)
    out = load(out_ref, batch, head, start_q, blocks.block_q)
    store(
        t_out_ref,
        batch,
        head,
        start_q,
        [a - mean[:, None] * o.astype(jnp.float32) for a, o in zip(acc, out, strict=True)],
    )
