"""Attention to a cache with Pallas-Triton: the keys of an example are split between programs, then merged.

One query an example is too little work for a GPU, so several programs share the keys of one example and one key
head. Each takes all query heads that read that key head, as columns of one product, so that keys and values are
read once; it writes its output and log-sum-exp, and a second kernel adds up the parts. How the keys are shared is
decided by the length, not by the capacity: no tile past it is read, and no program writes what another does.

A cache in pages differs in one line: which row of memory a key is in.

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
LOG2_E = math.log2(math.e)  # scores are kept times this: the chip computes exp2 and not exp
# The log-sum-exp of nothing; finite, for exp2(-inf - LOWEST) is 0 where exp2(-inf + inf) is nan.
LOWEST = float(jnp.finfo(jnp.float32).min)

USUAL_CORES = 132  # of an H200, for a device whose cores are not known
PROGRAMS_A_CORE = 2  # what shared memory holds at once, heads of 128
START = 2  # tiles: an estimate of the time a program takes to fill its pipeline and to write its part
MOST_SPLITS = 128  # what one program merges


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the keys are cut: `splits` programs an example and key head, which walk tiles of block_k keys."""

    block_k: int  # a power of two; Hopper's matrix unit, for which keys are the rows, wants 64
    splits: int
    num_warps: int
    num_stages: int  # tiles in flight between memory and the matrix units


def blocks_for(q, kv_heads: int, most: int, *, paged: bool) -> Blocks:
    """The blocks for q (B, N, H) and caches of up to `most` keys: none spills at the cases' sizes on sm_90a and sm_80.

    A tile in pages waits for its page numbers, and Triton's pipeline counts that wait as stages: it takes 2 n - 1
    for as many tiles in flight as n make of keys that lie in a row.
    """
    B, N, H = q.shape
    if q.dtype.itemsize == 4:  # products that keep all of float32 run on the plain cores, and larger tiles spill
        block_k, num_warps, num_stages = 16, 8, 3
    else:
        block_k, num_stages = 64, 3 if H <= 128 else 2
        num_warps = 4 if H * _columns(N // kv_heads) <= 4096 else 8
    splits = _splits(B * kv_heads, pl.cdiv(most, block_k))
    return Blocks(block_k, splits, num_warps, 2 * num_stages - 1 if paged else num_stages)


def _splits(pairs: int, tiles: int) -> int:
    """How many programs share the keys of each (example, key head): what takes least time, in tiles.

    Programs run in waves of as many as the GPU holds; each takes its share of the tiles, and START.
    """
    known = by_device_kind(backend.target().kind)
    slots = PROGRAMS_A_CORE * (known.cores if known else USUAL_CORES)
    time = lambda splits: pl.cdiv(pairs * splits, slots) * (pl.cdiv(tiles, splits) + START)
    return min(range(1, min(tiles, MOST_SPLITS) + 1), key=time)


def _columns(group: int) -> int:
    """Of a product: a power of two, 16 at least, that holds the query heads of one key head."""
    return max(pl.next_power_of_2(group), 16)


def unsupported(q, k_cache, *arrays, scale, softcap) -> str | None:
    """Why these arguments cannot run here, or None; for a cache in pages too."""
    del arrays, scale, softcap
    if q.dtype.name not in DTYPES:
        return f"needs a dtype among {', '.join(DTYPES)}, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > WIDEST:
        return f"needs a head width that is a multiple of 8 up to {WIDEST}, got {q.shape[-1]}"
    if q.shape[1] > LARGEST_GROUP * k_cache.shape[2]:
        return f"needs {LARGEST_GROUP} query heads a key head at most, got {q.shape[1] // k_cache.shape[2]}"
    return backend.why_not_triton()


def forward(q, k_cache, v_cache, lengths, *, scale, softcap):
    """The output, and the arguments for the backward."""
    S = k_cache.shape[1]
    cache = _Cache(k_cache, v_cache, table=None, page=S, most=S)
    work = cost.forward(q, k_cache, v_cache, _unknown(lengths))
    out = _attend("decode_attention", q, cache, lengths, scale, softcap, work)
    return out, (q, k_cache, v_cache, lengths)


def paged_forward(q, k_pages, v_pages, block_table, lengths, *, scale, softcap):
    """The same of a cache in pages."""
    W = k_pages.shape[1]
    cache = _Cache(k_pages, v_pages, table=block_table, page=W, most=W * block_table.shape[1])
    work = cost.paged_forward(q, k_pages, v_pages, block_table, _unknown(lengths))
    out = _attend("paged_decode_attention", q, cache, lengths, scale, softcap, work)
    return out, (q, k_pages, v_pages, block_table, lengths)


def _unknown(lengths) -> jax.ShapeDtypeStruct:
    """Outside jit the values are at hand, and an estimate made of them would compile the kernel anew for each token."""
    return jax.ShapeDtypeStruct(lengths.shape, lengths.dtype)


@dataclasses.dataclass(frozen=True)
class _Cache:
    """Keys and values as pages of `page` keys, and whose they are: table[b, j], or page b where there is none."""

    k: jax.Array  # (P, W, K, H)
    v: jax.Array
    table: jax.Array | None  # (B, J)
    page: int
    most: int  # keys an example may have


def _attend(name, q, cache, lengths, scale, softcap, work):
    """One program for each example, split and key head; then the splits merged."""
    B, N, H = q.shape
    P, W, K, _ = cache.k.shape
    blocks = blocks_for(q, K, cache.most, paged=cache.table is not None)
    arrays = (q, *(x.reshape(P * W, K, H) for x in (cache.k, cache.v)), cache.table, lengths)
    # A program that has no other to be merged with writes the output itself.
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
    """The output from parts (B, splits, N, H) and their log-sum-exp."""
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
    """Online softmax over one program's tiles: FlashAttention-2, algorithm 1, with the scores transposed.

    Keys are the rows and query heads the columns, 16 at least: what wgmma takes without padding 4 heads to 64.
    """
    kv_heads = k_ref.shape[1]
    group = q_ref.shape[1] // kv_heads
    kv_head = jax.lax.rem(pl.program_id(0), kv_heads)  # heads side by side, as they are in memory
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
    total = jnp.where(total == 0, 1.0, total)  # no key: the output is 0
    _store(out_ref, (batch, split, heads), head_exists, [(a / total[None, :]).T for a in acc])
    pltriton.store(lse_ref.at[batch, split, heads], top + jnp.log2(total), mask=head_exists)


def _merge_kernel(parts_ref, lse_ref, out_ref):
    """out = sum_i 2^(lse_i - lse) part_i of one query head; where no part has a key all are 0, and so is out."""
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
    """Where in memory each key is; the table is not read past the length."""
    if table_ref is None:
        return batch * page + key
    number = pltriton.load(table_ref.at[batch, jax.lax.div(key, page)], mask=exists, other=0)
    return number * page + jax.lax.rem(key, page)


def _score(products, *, scale, softcap):
    """Scores times log2(e), from products of a query and a key."""
    if softcap is None:
        return products * (scale * LOG2_E)
    return jnp.tanh(products * (scale / softcap)) * (softcap * LOG2_E)


def pieces(width: int) -> list[tuple[int, int]]:
    """(start, size) of powers of two >= 16 that cover a head width: (0, 64), (64, 16) for 72."""
    padded = pl.cdiv(width, 16) * 16
    sizes = [size for size in (256, 128, 64, 32, 16) if padded & size]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _load_at(ref, row, head, exists):
    """ref[row, head] for a vector of rows from anywhere, as pieces; zero where there is no row, and past its end."""
    width = ref.shape[-1]
    # Not a slice of columns: interpret mode knows no mixture of slices and vectors.
    at = [ref.at[row[:, None], head, _count(first, size)[None, :]] for first, size in pieces(width)]
    masks = _masks(width, exists)
    return [pltriton.load(a, mask=mask, other=0.0) for a, mask in zip(at, masks, strict=True)]


def _load(ref, index, exists):
    """ref[*index] where the index ends in a slice of rows, likewise."""
    return [pltriton.load(at, mask=mask, other=0.0) for at, mask in _places(ref, index, exists)]


def _store(ref, index, exists, values) -> None:
    for (at, mask), value in zip(_places(ref, index, exists), values, strict=True):
        pltriton.store(at, value.astype(ref.dtype), mask=mask)


def _places(ref, index, exists):
    """(view, mask) of each piece."""
    width = ref.shape[-1]
    columns = [pl.ds(jnp.int32(first), size) for first, size in pieces(width)]  # a static slice may not hang over
    return [(ref.at[(*index, c)], mask) for c, mask in zip(columns, _masks(width, exists), strict=True)]


def _masks(width, exists):
    for first, size in pieces(width):
        mask = jnp.broadcast_to(exists[:, None], (exists.shape[0], size))
        yield mask & (_count(first, size) < width)[None, :] if first + size > width else mask


def _count(first, size: int) -> jax.Array:
    """first, ..., first + size - 1."""
    return first + jnp.arange(size, dtype=jnp.int32)
