"""Flash attention in Pallas-Triton: one program per output tile; the scores stay in registers.

The forward and the d_q kernel loop over the key tiles that are visible to a query tile; the d_k/d_v kernel loops over
the query tiles that a key tile is visible to. So every output is written once, by one program, in a fixed order: there
are no atomics, and results are bit-reproducible. Hidden tiles are skipped, and fully visible tiles are not masked
(tiles.py).

Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .. import backend
from ..pallas.triton import dot, run
from . import cost, tiles
from .blocks import blocks_for
from .heads import contained, load, load_row, product, store, store_row, zeros
from .programs import key_lists, kv_head_of, program, seen_in, walk
from .scores import LOG2_E, LOWEST, Scores, d_sinks, delta_of, natural, weights_of


WIDEST = 256
DTYPES = ("bfloat16", "float16", "float32")


def unsupported(q, k, v, mask, sinks, *, scale, softcap, return_lse) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del k, v, mask, scale, softcap, return_lse
    for x in (q,) if sinks is None else (q, sinks):
        if x.dtype.name not in DTYPES:
            return f"needs a dtype among {', '.join(DTYPES)}, got {x.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > WIDEST:
        return f"needs a head width that is a multiple of 8 up to {WIDEST}, got {q.shape[-1]}"
    return backend.why_not_triton()


def forward(q, k, v, mask, sinks, *, scale, softcap, return_lse):
    """The output, and (q, k, v, mask, sinks, out, lse) for `backward`.

    lse, float32 (B, N, T), is log2(sum_s exp(score)), and LOWEST for a query without visible keys.
    """
    B, T, N, _ = q.shape
    blocks = blocks_for("forward", q, k, mask)
    out, lse = run(
        functools.partial(_forward_kernel, scores=Scores.of(q, scale, softcap), blocks=blocks),
        *(q, k, v, *key_lists(mask, q, k, blocks), sinks),
        name="flash_attention_forward",
        programs=pl.cdiv(T, blocks.block_q) * N * B,
        blocks=blocks,
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        work=cost.forward(q, k, v, cost.without_values(mask), sinks),
    )
    residuals = (q, k, v, mask, sinks, out, lse)
    return (out, natural(lse)) if return_lse else out, residuals


def backward(residuals, d_out, *, scale, softcap, return_lse):
    """d_q, d_k, d_v and d_sinks."""
    q, k, v, mask, sinks, out, lse = residuals
    d_out, d_lse = (d_out[0], jnp.swapaxes(d_out[1], 1, 2)) if return_lse else (d_out, None)
    scores = Scores.of(q, scale, softcap)
    name = "flash_attention_backward"
    d_q, d_k, d_v, delta = gradients(q, k, v, mask, out, lse, d_out, d_lse, scores=scores, name=name)
    return d_q, d_k, d_v, None, None if sinks is None else d_sinks(sinks, lse, delta)


def gradients(q, k, v, mask, out, lse, d_out, d_lse, *, scores, name):
    """d_q, d_k, d_v and delta = rowsum(out * d_out) - d_lse, by two kernels.

    The d_q kernel writes delta; the d_k/d_v kernel reads delta instead of out and d_lse.
    """
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    blocks = blocks_for("dq", q, k, mask)
    d_q, delta = run(
        functools.partial(_dq_kernel, scores=scores, blocks=blocks),
        *(q, k, v, *key_lists(mask, q, k, blocks), out, d_out, lse, d_lse),
        name=f"{name}_dq",
        programs=pl.cdiv(T, blocks.block_q) * N * B,
        blocks=blocks,
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        work=cost.backward_dq(q, k, v, cost.without_values(mask)),
    )
    blocks = blocks_for("dkv", q, k, mask)
    d_k, d_v = run(
        functools.partial(_dkv_kernel, scores=scores, blocks=blocks),
        *(q, k, v, mask, None if mask is None else tiles.query_tiles(mask, blocks.block_q, blocks.block_k)),
        *(d_out, lse, delta),
        name=f"{name}_dkv",
        programs=pl.cdiv(S, blocks.block_k) * K * B,
        blocks=blocks,
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        work=cost.backward_dkv(q, k, v, cost.without_values(mask)),
    )
    return d_q, d_k, d_v, delta


def _forward_kernel(q_ref, k_ref, v_ref, mask, lists, sinks_ref, out_ref, lse_ref, *, scores, blocks):
    """Online softmax over the key tiles: FlashAttention-2, algorithm 1."""
    batch, head, tile_q = program(q_ref, blocks.block_q)
    kv_head, start_q = kv_head_of(head, q_ref, k_ref), tile_q * blocks.block_q
    q = load(q_ref, batch, head, start_q, blocks.block_q)

    def step(tile, _, carry, *, masked):
        acc, top, total = carry
        start_k = tile * blocks.block_k
        score, _ = scores(product(q, load(k_ref, batch, kv_head, start_k, blocks.block_k)))
        v = load(v_ref, batch, kv_head, start_k, blocks.block_k)
        if masked:
            v, poison = contained(v)
            score = jnp.where(seen_in(mask, batch, start_q, start_k, blocks), score + poison[None, :], -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(score, axis=1))
        weights = jnp.exp2(score - new_top[:, None])
        decay = jnp.exp2(top - new_top)
        acc = tuple(a * decay[:, None] + dot(weights.astype(v_ref.dtype), x) for a, x in zip(acc, v, strict=True))
        return acc, new_top, total * decay + jnp.sum(weights, axis=1)

    # A sink is a key with this score and no value: the sum starts with it. Without sinks the score is -inf.
    sink = -jnp.inf if sinks_ref is None else sinks_ref[head].astype(jnp.float32) * LOG2_E
    top = jnp.maximum(jnp.full((blocks.block_q,), sink, jnp.float32), LOWEST)
    carry = zeros(blocks.block_q, q_ref), top, jnp.exp2(sink - top)
    acc, top, total = walk(step, carry, lists, batch, tile_q, k_ref.shape[1] // blocks.block_k)
    total = jnp.where(total == 0, 1.0, total)  # a query without visible keys has output 0
    store(out_ref, batch, head, start_q, [a / total[:, None] for a in acc])
    store_row(lse_ref, batch, head, start=start_q, values=top + jnp.log2(total))


def _dq_kernel(
    q_ref, k_ref, v_ref, mask, lists, out_ref, d_out_ref, lse_ref, d_lse_ref, d_q_ref, delta_ref, *, scores, blocks
):
    """d_q = scale d_scores k, with d_scores = weights (d_out v^T - delta): FlashAttention-2, algorithm 2."""
    batch, head, tile_q = program(q_ref, blocks.block_q)
    kv_head, start_q = kv_head_of(head, q_ref, k_ref), tile_q * blocks.block_q
    q = load(q_ref, batch, head, start_q, blocks.block_q)
    d_out = load(d_out_ref, batch, head, start_q, blocks.block_q)
    lse = load_row(lse_ref, batch, head, start=start_q, block=blocks.block_q)
    out = load(out_ref, batch, head, start_q, blocks.block_q)
    parts = [jnp.sum(delta_of(a, b), axis=1) for a, b in zip(out, d_out, strict=True)]
    delta = functools.reduce(jnp.add, parts)
    if d_lse_ref is not None:
        delta -= load_row(d_lse_ref, batch, head, start=start_q, block=blocks.block_q)
    store_row(delta_ref, batch, head, start=start_q, values=delta)

    def step(tile, _, d_q, *, masked):
        start_k = tile * blocks.block_k
        k = load(k_ref, batch, kv_head, start_k, blocks.block_k)
        score, tanh = scores(product(q, k))
        weights = weights_of(score, lse[:, None])
        d_weights = product(d_out, load(v_ref, batch, kv_head, start_k, blocks.block_k))
        d_scores = scores.through(weights * (d_weights - delta[:, None]), tanh)
        if masked:
            d_scores = jnp.where(seen_in(mask, batch, start_q, start_k, blocks), d_scores, 0.0)
            k, _ = contained(k)  # a visible one has made d_scores NaN
        d_scores = d_scores.astype(k_ref.dtype)
        return tuple(d + dot(d_scores, x) for d, x in zip(d_q, k, strict=True))

    d_q = walk(step, zeros(blocks.block_q, q_ref), lists, batch, tile_q, k_ref.shape[1] // blocks.block_k)
    store(d_q_ref, batch, head, start_q, [d * scores.scale for d in d_q])


def _dkv_kernel(q_ref, k_ref, v_ref, mask, lists, d_out_ref, lse_ref, delta_ref, d_k_ref, d_v_ref, *, scores, blocks):
    """d_v = weights^T d_out and d_k = scale d_scores^T q, summed over the query heads of this key/value head.

    Scores are transposed, (block_k, block_q), so that the weights are the left operand without a transposition. Rows
    and columns past the ends of the arrays need no mask: q, d_out, lse and delta of a query there are 0, so it adds 0;
    a key there is not stored.
    """
    batch, kv_head, tile_k = program(k_ref, blocks.block_k)
    start_k = tile_k * blocks.block_k
    k = load(k_ref, batch, kv_head, start_k, blocks.block_k)
    v = load(v_ref, batch, kv_head, start_k, blocks.block_k)
    group = q_ref.shape[2] // k_ref.shape[2]

    def step(tile, member, carry, *, masked):
        d_k, d_v = carry
        head = kv_head * group + member
        start_q = tile * blocks.block_q
        q = load(q_ref, batch, head, start_q, blocks.block_q)
        score, tanh = scores(product(k, q))
        weights = weights_of(score, load_row(lse_ref, batch, head, start=start_q, block=blocks.block_q)[None, :])
        d_out = load(d_out_ref, batch, head, start_q, blocks.block_q)
        delta = load_row(delta_ref, batch, head, start=start_q, block=blocks.block_q)
        d_scores = scores.through(weights * (product(v, d_out) - delta[None, :]), tanh)
        if masked:
            q, _ = contained(q)  # a visible one has made d_scores NaN
            d_out, poison = contained(d_out)
            seen = seen_in(mask, batch, start_q, start_k, blocks, transposed=True)
            weights = jnp.where(seen, weights + poison[None, :], 0.0)
            d_scores = jnp.where(seen, d_scores, 0.0)
        narrow, d_scores = weights.astype(v_ref.dtype), d_scores.astype(q_ref.dtype)
        d_v = tuple(d + dot(narrow, x) for d, x in zip(d_v, d_out, strict=True))
        d_k = tuple(d + dot(d_scores, x) for d, x in zip(d_k, q, strict=True))
        return d_k, d_v

    none = zeros(blocks.block_k, k_ref)
    count = pl.cdiv(q_ref.shape[1], blocks.block_q)
    d_k, d_v = walk(step, (none, none), lists, batch, tile_k, count, group=group)
    store(d_k_ref, batch, kv_head, start_k, [d * scores.scale for d in d_k])
    store(d_v_ref, batch, kv_head, start_k, d_v)
