"""Attention with Pallas-Triton: one program an output tile; its scores live and die in registers.

Forward, and the backward for queries, walk the key tiles; the backward for keys walks the query tiles. So
every output is written once, by one program, in one order: no atomics, and two runs agree to the bit.

A head is held as `pieces` of its width, powers of two as Triton wants them: 72 is 64 + 16 with the last 8
masked, where padding to 128 would waste almost half of the arithmetic. Scores are kept times log2(e), because
the chip computes exp2 and not exp.

Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from .. import backend
from . import cost


LOG2_E = math.log2(math.e)
# Where a running maximum starts; finite, for exp2(-inf - LOWEST) is 0 where exp2(-inf + inf) is nan.
LOWEST = float(jnp.finfo(jnp.float32).min)
WIDEST = 256
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one kernel cuts its work; powers of two, at least 16."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int  # tiles in flight between memory and the tensor cores


def blocks_for(kernel: str, width: int, dtype, causal: bool) -> Blocks:
    """The blocks of "forward", "dq" or "dkv": on sm_90a none spills at head widths 64, 72, 80, 96 and 128."""
    if jnp.dtype(dtype).itemsize == 4:
        # Products that keep all of float32 run on the plain cores; larger tiles, or fewer warps, spill.
        return Blocks(16, 16, 8, 2)
    found = _BLOCKS[kernel, next(w for w in (64, 96, 128, 256) if width <= w)]
    if kernel == "dkv" and causal and 64 < width <= 128:
        found = _DKV_CAUSAL
    capability = backend.target().capability
    if capability is not None and capability < 9.0:  # Ampere: 163 KiB of shared memory to Hopper's 227
        found = dataclasses.replace(found, num_stages=2)
    return found


_BLOCKS = {
    ("forward", 64): Blocks(64, 128, 4, 3),
    ("forward", 96): Blocks(128, 64, 8, 3),
    ("forward", 128): Blocks(128, 128, 8, 3),
    ("forward", 256): Blocks(128, 32, 8, 3),
    ("dq", 64): Blocks(64, 64, 4, 3),
    ("dq", 96): Blocks(64, 64, 4, 3),
    ("dq", 128): Blocks(64, 64, 4, 3),
    ("dq", 256): Blocks(64, 32, 4, 2),
    ("dkv", 64): Blocks(64, 64, 4, 3),
    ("dkv", 96): Blocks(64, 64, 4, 3),
    ("dkv", 128): Blocks(64, 64, 4, 2),
    ("dkv", 256): Blocks(16, 64, 8, 2),
}
_DKV_CAUSAL = Blocks(32, 128, 8, 3)  # two loops, one with the mask, take more registers than one


def unsupported(q, k, v, *, causal, scale) -> str | None:
    """Why these arguments cannot run here, or None."""
    del k, v, causal, scale
    if q.dtype.name not in DTYPES:
        return f"needs a dtype among {', '.join(DTYPES)}, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > WIDEST:
        return f"needs a head width that is a multiple of 8 up to {WIDEST}, got {q.shape[-1]}"
    return backend.why_not_triton()


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool,
    scale: float | None,
):
    """out, and (q, k, v, out, lse) for `backward`: lse = log2(sum_s exp(score)), float32 (B, N, T)."""
    B, T, N, H = q.shape
    blocks = blocks_for("forward", H, q.dtype, causal)
    out, lse = _run(
        functools.partial(_forward_kernel, causal=causal, scale=_log2_scale(q, scale), blocks=blocks),
        *(q, k, v),
        name="flash_attention_forward",
        programs=pl.cdiv(T, blocks.block_q) * N * B,
        blocks=blocks,
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        work=cost.forward(q, k, v, causal=causal, scale=scale),
    )
    return out, (q, k, v, out, lse)


def backward(residuals, d_out: Float[Array, "B T N H"], *, causal: bool, scale: float | None):
    """d_q, d_k and d_v, by two kernels; the first also writes delta = rowsum(out * d_out) for the second."""
    q, k, v, out, lse = residuals
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    options = {"causal": causal, "scale": _log2_scale(q, scale)}
    blocks = blocks_for("dq", H, q.dtype, causal)
    d_q, delta = _run(
        functools.partial(_dq_kernel, blocks=blocks, **options),
        *(q, k, v, out, d_out, lse),
        name="flash_attention_backward_dq",
        programs=pl.cdiv(T, blocks.block_q) * N * B,
        blocks=blocks,
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        work=cost.backward_dq(q, k, v, causal=causal),
    )
    blocks = blocks_for("dkv", H, q.dtype, causal)
    d_k, d_v = _run(
        functools.partial(_dkv_kernel, blocks=blocks, **options),
        *(q, k, v, d_out, lse, delta),
        name="flash_attention_backward_dkv",
        programs=pl.cdiv(S, blocks.block_k) * K * B,
        blocks=blocks,
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        work=cost.backward_dkv(q, k, v, causal=causal),
    )
    return d_q, d_k, d_v


def _run(kernel, *arrays, name, programs, blocks, out_shape, work):
    """A grid of one dimension: the others hold 65,535 at most, and are left to vmap."""
    return pl.pallas_call(
        kernel,
        name=name,
        grid=(programs,),
        in_specs=[pl.BlockSpec()] * len(arrays),
        out_specs=[pl.BlockSpec()] * len(out_shape),
        out_shape=out_shape,
        compiler_params=pltriton.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
        cost_estimate=work.estimate(),
        interpret=backend.interpret(),
    )(*arrays)


def _log2_scale(q, scale: float | None) -> float:
    return (q.shape[-1] ** -0.5 if scale is None else scale) * LOG2_E


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, lse_ref, *, causal, scale, blocks):
    """Online softmax over the key tiles: FlashAttention-2, algorithm 1."""
    batch, head, start_q = _program(q_ref, blocks.block_q)
    kv_head = _kv_head(head, q_ref, k_ref)
    q = _load(q_ref, batch, head, start_q, blocks.block_q)

    def step(tile, carry, *, masked):
        acc, top, total = carry
        start_k = tile * blocks.block_k
        scores = _product(q, _load(k_ref, batch, kv_head, start_k, blocks.block_k)) * scale
        if masked:
            scores = jnp.where(_seen(start_q, start_k, q_ref, k_ref, blocks, causal), scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        decay = jnp.exp2(top - new_top)
        v = _load(v_ref, batch, kv_head, start_k, blocks.block_k)
        acc = tuple(a * decay[:, None] + _dot(weights.astype(v_ref.dtype), x) for a, x in zip(acc, v, strict=True))
        return acc, new_top, total * decay + jnp.sum(weights, axis=1)

    top = jnp.full((blocks.block_q,), LOWEST, jnp.float32)
    carry = _zeros(blocks.block_q, q_ref), top, jnp.zeros_like(top)
    acc, top, total = _walk_keys(step, carry, start_q, q_ref, k_ref, blocks, causal)
    total = jnp.where(total == 0, 1.0, total)  # a query that saw nothing: its output is 0
    _store(out_ref, batch, head, start_q, [a / total[:, None] for a in acc])
    _store_row(lse_ref, batch, head, start_q, top + jnp.log2(total))


def _dq_kernel(q_ref, k_ref, v_ref, out_ref, d_out_ref, lse_ref, d_q_ref, delta_ref, *, causal, scale, blocks):
    """d_q = scale d_scores k, with d_scores = weights (d_out v^T - delta): FlashAttention-2, algorithm 2."""
    batch, head, start_q = _program(q_ref, blocks.block_q)
    kv_head = _kv_head(head, q_ref, k_ref)
    q = _load(q_ref, batch, head, start_q, blocks.block_q)
    d_out = _load(d_out_ref, batch, head, start_q, blocks.block_q)
    lse = _load_row(lse_ref, batch, head, start_q, blocks.block_q)
    out = _load(out_ref, batch, head, start_q, blocks.block_q)
    products = [a.astype(jnp.float32) * b.astype(jnp.float32) for a, b in zip(out, d_out, strict=True)]
    delta = functools.reduce(jnp.add, [jnp.sum(product, axis=1) for product in products])
    _store_row(delta_ref, batch, head, start_q, delta)

    def step(tile, d_q, *, masked):
        start_k = tile * blocks.block_k
        k = _load(k_ref, batch, kv_head, start_k, blocks.block_k)
        scores = _product(q, k) * scale
        if masked:
            scores = jnp.where(_seen(start_q, start_k, q_ref, k_ref, blocks, causal), scores, -jnp.inf)
        weights = jnp.exp2(scores - lse[:, None])
        d_weights = _product(d_out, _load(v_ref, batch, kv_head, start_k, blocks.block_k))
        d_scores = (weights * (d_weights - delta[:, None])).astype(k_ref.dtype)
        return tuple(d + _dot(d_scores, x) for d, x in zip(d_q, k, strict=True))

    d_q = _walk_keys(step, _zeros(blocks.block_q, q_ref), start_q, q_ref, k_ref, blocks, causal)
    _store(d_q_ref, batch, head, start_q, [d * (scale / LOG2_E) for d in d_q])


def _dkv_kernel(q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_k_ref, d_v_ref, *, causal, scale, blocks):
    """d_v = weights^T d_out and d_k = scale d_scores^T q, over every query head that reads this key head.

    Scores are transposed, (block_k, block_q), so that the weights are a left operand as they stand. Past the
    edges they need no mask: q, d_out, lse and delta of a query there are 0, and it adds 0; a key there is not
    stored.
    """
    batch, kv_head, start_k = _program(k_ref, blocks.block_k)
    k = _load(k_ref, batch, kv_head, start_k, blocks.block_k)
    v = _load(v_ref, batch, kv_head, start_k, blocks.block_k)
    group = q_ref.shape[2] // k_ref.shape[2]

    def step(tile, carry, *, head, masked):
        d_k, d_v = carry
        start_q = tile * blocks.block_q
        q = _load(q_ref, batch, head, start_q, blocks.block_q)
        scores = _product(k, q) * scale
        if masked:
            seen = _seen(start_q, start_k, q_ref, k_ref, blocks, causal, transposed=True)
            scores = jnp.where(seen, scores, -jnp.inf)
        weights = jnp.exp2(scores - _load_row(lse_ref, batch, head, start_q, blocks.block_q)[None, :])
        d_out = _load(d_out_ref, batch, head, start_q, blocks.block_q)
        d_v = tuple(d + _dot(weights.astype(v_ref.dtype), x) for d, x in zip(d_v, d_out, strict=True))
        delta = _load_row(delta_ref, batch, head, start_q, blocks.block_q)
        d_scores = (weights * (_product(v, d_out) - delta[None, :])).astype(q_ref.dtype)
        d_k = tuple(d + _dot(d_scores, x) for d, x in zip(d_k, q, strict=True))
        return d_k, d_v

    def one_head(member, carry):
        of_head = functools.partial(step, head=kv_head * group + member)
        return _walk_queries(of_head, carry, start_k, q_ref, k_ref, blocks, causal)

    zeros = _zeros(blocks.block_k, k_ref)
    d_k, d_v = jax.lax.fori_loop(0, group, one_head, (zeros, zeros))
    _store(d_k_ref, batch, kv_head, start_k, [d * (scale / LOG2_E) for d in d_k])
    _store(d_v_ref, batch, kv_head, start_k, d_v)


def _program(ref, block: int):
    """Batch index, head and first row of this program's tile; a head's tiles run side by side."""
    _, length, heads, _ = ref.shape
    count = pl.cdiv(length, block)
    rest = jax.lax.div(pl.program_id(0), count)
    return jax.lax.div(rest, heads), jax.lax.rem(rest, heads), jax.lax.rem(pl.program_id(0), count) * block


def _kv_head(head, q_ref, k_ref):
    return jax.lax.div(head, q_ref.shape[2] // k_ref.shape[2])


def _walk_keys(step, carry, start_q, q_ref, k_ref, blocks, causal):
    """Runs `step` over the key tiles that a query tile sees: those it sees whole, then those on an edge."""
    T, S, block = q_ref.shape[1], k_ref.shape[1], blocks.block_k
    if causal:
        seen_by_first = jnp.clip(start_q + (S - T + 1), 0, S)
        seen_by_last = jnp.clip(start_q + (S - T + blocks.block_q), 0, S)
        whole, end = jax.lax.div(seen_by_first, block), jax.lax.div(seen_by_last + (block - 1), block)
    else:
        whole, end = S // block, pl.cdiv(S, block)
    carry = jax.lax.fori_loop(0, whole, functools.partial(step, masked=False), carry)
    if causal or whole < end:
        carry = jax.lax.fori_loop(whole, end, functools.partial(step, masked=True), carry)
    return carry


def _walk_queries(step, carry, start_k, q_ref, k_ref, blocks, causal):
    """Runs `step` over the query tiles that see a key tile: on the diagonal, then those that see it whole."""
    T, S, block = q_ref.shape[1], k_ref.shape[1], blocks.block_q
    whole = 0
    if causal:
        first_to_see_any = jnp.clip(start_k - (S - T), 0, T)
        first_to_see_all = jnp.clip(start_k - (S - T) + (blocks.block_k - 1), 0, T)
        whole = jax.lax.div(first_to_see_all + (block - 1), block)
        diagonal = functools.partial(step, masked=True)
        carry = jax.lax.fori_loop(jax.lax.div(first_to_see_any, block), whole, diagonal, carry)
    return jax.lax.fori_loop(whole, pl.cdiv(T, block), functools.partial(step, masked=False), carry)


def _seen(start_q, start_k, q_ref, k_ref, blocks, causal, *, transposed=False):
    """Which scores of a tile count: the key exists and, causal, s <= t + S - T (which implies the former)."""
    T, S = q_ref.shape[1], k_ref.shape[1]
    query, key = _rows(start_q, blocks.block_q), _rows(start_k, blocks.block_k)
    query, key = (query[None, :], key[:, None]) if transposed else (query[:, None], key[None, :])
    return key <= query + (S - T) if causal else key < S


def pieces(width: int) -> list[tuple[int, int]]:
    """(start, size) of powers of two >= 16 that cover a head width: (0, 64), (64, 16) for 72."""
    padded = pl.cdiv(width, 16) * 16
    sizes = [size for size in (256, 128, 64, 32, 16) if padded & size]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _rows(start, count: int):
    return start + jnp.arange(count, dtype=jnp.int32)


def _places(ref, batch, head, start: jax.Array, block: int):
    """(view, mask) of each piece of ref[batch, start : start + block, head]; no mask where all is inside."""
    _, length, _, width = ref.shape
    for first, size in pieces(width):
        column = pl.ds(jnp.int32(first), size)  # a static slice past the edge would be refused
        row_exists = (_rows(start, block) < length)[:, None] if length % block else None
        column_exists = (_rows(first, size) < width)[None, :] if first + size > width else None
        exist = [x for x in (row_exists, column_exists) if x is not None]
        mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, exist), (block, size)) if exist else None
        yield ref.at[batch, pl.ds(start, block), head, column], mask


def _load(ref, batch, head, start, block: int) -> list[jax.Array]:
    """Rows of one head as pieces, zero past the edges."""
    places = _places(ref, batch, head, start, block)
    return [pltriton.load(at, mask=mask, other=None if mask is None else 0.0) for at, mask in places]


def _store(ref, batch, head, start, values) -> None:
    places = _places(ref, batch, head, start, values[0].shape[0])
    for (at, mask), value in zip(places, values, strict=True):
        pltriton.store(at, value.astype(ref.dtype), mask=mask)


def _row_mask(ref, start, block: int):
    return _rows(start, block) < ref.shape[2] if ref.shape[2] % block else None


def _load_row(ref, batch, head, start, block: int) -> jax.Array:
    """One float32 a query, from an array (B, N, T); zero past the edge."""
    mask = _row_mask(ref, start, block)
    return pltriton.load(ref.at[batch, head, pl.ds(start, block)], mask=mask, other=None if mask is None else 0.0)


def _store_row(ref, batch, head, start, values) -> None:
    block = values.shape[0]
    pltriton.store(ref.at[batch, head, pl.ds(start, block)], values, mask=_row_mask(ref, start, block))


def _zeros(block: int, ref):
    return tuple(jnp.zeros((block, size), jnp.float32) for _, size in pieces(ref.shape[3]))


def _product(a, b):
    """a b^T in float32, summed over the pieces of the head width."""
    return functools.reduce(jnp.add, [_dot(x, y, trans_b=True) for x, y in zip(a, b, strict=True)])


def _dot(a, b, *, trans_b=False):
    """Accumulates in float32; float32 operands keep all their bits, where the default rounds them to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return pltriton.dot(a, b, trans_b=trans_b, precision=precision)
