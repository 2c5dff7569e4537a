"""Decode attention in Pallas-Triton, contiguous and paged: split-KV (Flash-Decoding), then a merge kernel.

One query per example is too little parallelism for a GPU, so several programs (splits) share the keys of one example
and key head. A program takes all query heads of its key head as columns of one product, so that keys and values are
read once. It writes its output and log-sum-exp, and a second kernel merges the splits. The keys are divided by the
length of the example, not by the capacity of the cache: tiles past the length are not read, and no two programs write
the same element.

A paged cache differs only in the memory row of a key (`_row`).

Source: Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; pages: PagedAttention,
https://arxiv.org/abs/2309.06180, section 4.1.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from .. import backend
from ..hardware import by_device_kind
from ..pallas.triton import dot, run
from . import cost


WIDEST = 256
LARGEST_GROUP = 64
DTYPES = ("bfloat16", "float16", "float32")
LOG2_E = math.log2(math.e)  # scores are in base 2, because GPUs have an instruction for exp2 and none for exp
# The log-sum-exp without keys. It is finite because exp2(-inf - LOWEST) is 0, while exp2(-inf + inf) is NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)

USUAL_CORES = 132  # the SMs of an H200, assumed for a device that hardware.py does not know
PROGRAMS_A_CORE = 2  # occupancy: programs per SM that shared memory allows, for heads of 128
START = 2  # in tiles: the estimated time of a program to fill its pipeline and to write its result
MOST_SPLITS = 128  # the most splits that one program of the merge kernel reads


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes: `splits` programs per example and key head, which loop over tiles of block_k keys."""

    block_k: int  # a power of two; keys are the rows of the product, of which wgmma needs 64
    splits: int
    num_warps: int
    num_stages: int  # software pipelining: tiles in flight


def blocks_for(q, kv_heads: int, most: int, *, paged: bool) -> Blocks:
    """The block sizes for q (B, N, H) and up to `most` keys: none spills at the cases' sizes on sm_90a and sm_80.

    The load of a paged tile depends on the load of its page numbers, which takes stages of Triton's pipeline too:
    2 n - 1 stages keep as many tiles in flight as n stages do for a contiguous cache.
    """
    B, N, H = q.shape
    if q.dtype.itemsize == 4:  # full float32 products run on the CUDA cores, and larger tiles spill
        block_k, num_warps, num_stages = 16, 8, 3
    else:
        block_k, num_stages = 64, 3 if H <= 128 else 2
        num_warps = 4 if H * _columns(N // kv_heads) <= 4096 else 8
    splits = _splits(B * kv_heads, pl.cdiv(most, block_k))
    return Blocks(block_k, splits, num_warps, 2 * num_stages - 1 if paged else num_stages)


def _splits(pairs: int, tiles: int) -> int:
    """The number of programs that share the keys of each (example, key head): the least estimated time, in tiles.

    Programs run in waves of as many as the GPU holds at once; each takes the time of its tiles plus START.
    """
    known = by_device_kind(backend.target().kind)
    slots = PROGRAMS_A_CORE * (known.cores if known else USUAL_CORES)
    time = lambda splits: pl.cdiv(pairs * splits, slots) * (pl.cdiv(tiles, splits) + START)
    return min(range(1, min(tiles, MOST_SPLITS) + 1), key=time)


def _columns(group: int) -> int:
    """The columns of the product for the query heads of one key head: a power of two, at least 16."""
    return max(pl.next_power_of_2(group), 16)


def unsupported(q, k_cache, *arrays, scale, softcap) -> str | None:
    """The reason why these arguments cannot run here, or None; for contiguous and paged caches."""
    del arrays, scale, softcap
    if q.dtype.name not in DTYPES:
        return f"needs a dtype among {', '.join(DTYPES)}, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > WIDEST:
        return f"needs a head width that is a multiple of 8 up to {WIDEST}, got {q.shape[-1]}"
    if q.shape[1] > LARGEST_GROUP * k_cache.shape[2]:
        return f"needs at most {LARGEST_GROUP} query heads per key head, got {q.shape[1] // k_cache.shape[2]}"
    return backend.why_not_triton()


def forward(q, k_cache, v_cache, lengths, *, scale, softcap):
    """The output, and the arguments as residuals."""
    S = k_cache.shape[1]
    cache = _Cache(k_cache, v_cache, table=None, page=S, most=S)
    work = cost.forward(q, k_cache, v_cache, _unknown(lengths))
    out = _attend("decode_attention", q, cache, lengths, scale, softcap, work)
    return out, (q, k_cache, v_cache, lengths)


def paged_forward(q, k_pages, v_pages, block_table, lengths, *, scale, softcap):
    """As `forward`, for a paged cache."""
    W = k_pages.shape[1]
    cache = _Cache(k_pages, v_pages, table=block_table, page=W, most=W * block_table.shape[1])
    work = cost.paged_forward(q, k_pages, v_pages, block_table, _unknown(lengths))
    out = _attend("paged_decode_attention", q, cache, lengths, scale, softcap, work)
    return out, (q, k_pages, v_pages, block_table, lengths)


def _unknown(lengths) -> jax.ShapeDtypeStruct:
    """The shape of the lengths. A cost estimate from their values (known outside jit) would recompile per token."""
    return jax.ShapeDtypeStruct(lengths.shape, lengths.dtype)


@dataclasses.dataclass(frozen=True)
class _Cache:
    """Keys and values as pages of `page` keys: page j of example b is table[b, j], or page b without a table."""

    k: jax.Array  # (P, W, K, H)
    v: jax.Array
    table: jax.Array | None  # (B, J)
    page: int
    most: int  # the most keys an example can have


def _attend(name, q, cache, lengths, scale, softcap, work):
    """Runs one program per example, split and key head, then merges the splits."""
    B, N, H = q.shape
    P, W, K, _ = cache.k.shape
    blocks = blocks_for(q, K, cache.most, paged=cache.table is not None)
    arrays = (q, *(x.reshape(P * W, K, H) for x in (cache.k, cache.v)), cache.table, lengths)
    # Without splits the program writes the output itself.
    part = jax.ShapeDtypeStruct((B, blocks.splits, N, H), q.dtype if blocks.splits == 1 else jnp.float32)
    out, lse = run(
        functools.partial(
            _forward_kernel,
            score_of=functools.partial(_score, scale=H**-0.5 if scale is None else scale, softcap=softcap),
            page=cache.page,
            most=cache.most,
            blocks=blocks,
        ),
        *arrays,
        name=f"{name}_forward",
        programs=B * blocks.splits * K,
        blocks=blocks,
        out_shape=[part, jax.ShapeDtypeStruct(part.shape[:3], jnp.float32)],
        work=work,
    )
    return out.reshape(q.shape) if blocks.splits == 1 else _merge(name, out, lse, q)


def _merge(name, parts, lse, q):
    """Merges the outputs of the splits, (B, splits, N, H), by their log-sum-exp."""
    return pl.pallas_call(
        _merge_kernel,
        name=f"{name}_forward_merge",
        grid=(q.shape[0] * q.shape[1],),
        in_specs=[pl.BlockSpec()] * 2,
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=8),
        cost_estimate=cost.merge(q, parts.shape[1]).estimate(),
        interpret=backend.interpret(),
    )(parts, lse)


def _forward_kernel(
    q_ref, k_ref, v_ref, table_ref, lengths_ref, out_ref, lse_ref, *, score_of, page, most, blocks
):  # fmt: skip
    """Online softmax over one program's tiles: FlashAttention-2, algorithm 1, with transposed scores.

    Keys are the rows and query heads the columns, at least 16, of the product: wgmma would need 64 rows, and so pad
    4 query heads to 64, if the query heads were the rows.
    """
    kv_heads = k_ref.shape[1]
    group = q_ref.shape[1] // kv_heads
    kv_head = jax.lax.rem(pl.program_id(0), kv_heads)  # consecutive programs have consecutive heads, as in memory
    rest = jax.lax.div(pl.program_id(0), kv_heads)
    split, batch = jax.lax.rem(rest, blocks.splits), jax.lax.div(rest, blocks.splits)
    length = jnp.clip(lengths_ref[batch], 0, most)
    tiles = jax.lax.div(length + (blocks.block_k - 1), blocks.block_k)
    first, last = (jax.lax.div((split + i) * tiles, blocks.splits) for i in (0, 1))

    columns = _columns(group)
    heads, head_exists = pl.ds(kv_head * group, columns), _count(0, columns) < group
    q = _load(q_ref, (batch, heads), head_exists)

    def step(tile, carry):
        acc, top, total = carry
        key = _count(tile * blocks.block_k, blocks.block_k)
        exists = key < length
        row = _row(table_ref, batch, key, exists, page)
        k = _load_at(k_ref, row, kv_head, exists)
        products = [dot(x, y, trans_b=True) for x, y in zip(k, q, strict=True)]
        score = jnp.where(exists[:, None], score_of(functools.reduce(jnp.add, products)), -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(score, axis=0))
        weights = jnp.exp2(score - new_top[None, :])
        decay = jnp.exp2(top - new_top)
        v = _load_at(v_ref, row, kv_head, exists)
        weights_v = [dot(x, weights.astype(v_ref.dtype), trans_a=True) for x in v]
        acc = tuple(a * decay[None, :] + b for a, b in zip(acc, weights_v, strict=True))
        return acc, new_top, total * decay + jnp.sum(weights, axis=0)

    none = tuple(jnp.zeros((size, columns), jnp.float32) for _, size in pieces(q_ref.shape[2]))
    top = jnp.full((columns,), LOWEST, jnp.float32)
    acc, top, total = jax.lax.fori_loop(first, last, step, (none, top, jnp.zeros_like(top)))
    total = jnp.where(total == 0, 1.0, total)  # without keys the output is 0
    _store(out_ref, (batch, split, heads), head_exists, [(a / total[None, :]).T for a in acc])
    pltriton.store(lse_ref.at[batch, split, heads], top + jnp.log2(total), mask=head_exists)


def _merge_kernel(parts_ref, lse_ref, out_ref):
    """out = sum_i 2^(lse_i - lse) part_i for one query head; if no split has keys, all parts and out are 0."""
    _, splits, heads, width = parts_ref.shape
    batch, head = jax.lax.div(pl.program_id(0), heads), jax.lax.rem(pl.program_id(0), heads)
    padded = pl.next_power_of_2(splits)
    every, exists = pl.ds(jnp.int32(0), padded), _count(0, padded) < splits
    lse = pltriton.load(lse_ref.at[batch, every, head], mask=exists, other=LOWEST)
    weights = jnp.exp2(lse - jnp.max(lse, axis=0))
    weights = weights / jnp.sum(weights, axis=0)
    parts = _load(parts_ref, (batch, every, head), exists)
    sums = [jnp.sum(part * weights[:, None], axis=0) for part in parts]
    for (first, size), value in zip(pieces(width), sums, strict=True):
        at = out_ref.at[batch, head, pl.ds(jnp.int32(first), size)]
        pltriton.store(at, value.astype(out_ref.dtype), mask=_count(first, size) < width)


def _row(table_ref, batch, key, exists, page):
    """The memory row of each key; the block table is not read past the length."""
    if table_ref is None:
        return batch * page + key
    number = pltriton.load(table_ref.at[batch, jax.lax.div(key, page)], mask=exists, other=0)
    return number * page + jax.lax.rem(key, page)


def _score(products, *, scale, softcap):
    """The scores in base 2 (times log2(e)) from the products <q, k>."""
    if softcap is None:
        return products * (scale * LOG2_E)
    return jnp.tanh(products * (scale / softcap)) * (softcap * LOG2_E)


def pieces(width: int) -> list[tuple[int, int]]:
    """(start, size) of powers of two >= 16 that cover a head width: (0, 64), (64, 16) for 72."""
    padded = pl.cdiv(width, 16) * 16
    sizes = [size for size in (256, 128, 64, 32, 16) if padded & size]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _load_at(ref, row, head, exists):
    """ref[row, head] for a vector of row numbers (a gather), as pieces; zero for masked rows and columns."""
    width = ref.shape[-1]
    # The columns are a vector and not a slice: interpret mode does not support mixing slices and vectors.
    at = [ref.at[row[:, None], head, _count(first, size)[None, :]] for first, size in pieces(width)]
    masks = _masks(width, exists)
    return [pltriton.load(a, mask=mask, other=0.0) for a, mask in zip(at, masks, strict=True)]


def _load(ref, index, exists):
    """ref[*index], where the index ends in a slice of rows, as pieces; zero for masked rows and columns."""
    return [pltriton.load(at, mask=mask, other=0.0) for at, mask in _places(ref, index, exists)]


def _store(ref, index, exists, values) -> None:
    for (at, mask), value in zip(_places(ref, index, exists), values, strict=True):
        pltriton.store(at, value.astype(ref.dtype), mask=mask)


def _places(ref, index, exists):
    """(view, mask) of each piece."""
    width = ref.shape[-1]
    # The start is an array, because a static slice past the edge is an error.
    columns = [pl.ds(jnp.int32(first), size) for first, size in pieces(width)]
    return [(ref.at[(*index, c)], mask) for c, mask in zip(columns, _masks(width, exists), strict=True)]


def _masks(width, exists):
    for first, size in pieces(width):
        mask = jnp.broadcast_to(exists[:, None], (exists.shape[0], size))
        yield mask & (_count(first, size) < width)[None, :] if first + size > width else mask


def _count(first, size: int) -> jax.Array:
    """first, ..., first + size - 1."""
    return first + jnp.arange(size, dtype=jnp.int32)
