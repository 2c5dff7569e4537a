"""Shared code of the Triton attention kernels: the program's output tile, the loop over visible tiles, and masking."""

import jax
from jax.experimental import pallas as pl

from . import tiles
from .heads import load_row, rows
from .mask import AttentionMask, row_of


def key_lists(mask, q, k, blocks):
    """The mask and its tile lists; (None, None) if every key tile is fully visible."""
    if mask is None and k.shape[1] % blocks.block_k == 0:
        return None, None
    mask = AttentionMask.full(q.shape[1], k.shape[1]) if mask is None else mask
    return mask, tiles.key_tiles(mask, blocks.block_q, blocks.block_k)


def program(ref, block: int):
    """(batch index, head, tile index) of this program; consecutive programs have the tiles of one head."""
    _, length, heads, _ = ref.shape
    count = pl.cdiv(length, block)
    rest = jax.lax.div(pl.program_id(0), count)
    return jax.lax.div(rest, heads), jax.lax.rem(rest, heads), jax.lax.rem(pl.program_id(0), count)


def kv_head_of(head, q_ref, k_ref):
    """The key/value head of a query head."""
    return jax.lax.div(head, q_ref.shape[2] // k_ref.shape[2])


def walk(step, carry, lists, batch, row, count: int, *, group: int = 1):
    """Runs step(tile, member, carry) over the visible tiles of one row of tiles, for each head of a group.

    Fully visible tiles come first, without masking, then partially visible tiles. Without lists, all `count` tiles are
    fully visible.
    """
    if lists is None:
        return _loop(step, carry, lambda i: i, count, group, masked=False)
    example = row_of(lists.whole, batch)
    whole, seen = lists.whole[example, row], lists.seen[example, row]
    carry = _loop(step, carry, lambda i: lists.order[example, row, i], whole, group, masked=False)
    return _loop(step, carry, lambda i: lists.order[example, row, whole + i], seen - whole, group, masked=True)


def _loop(step, carry, tile_at, count, group: int, *, masked: bool):
    def nth(i, carry):
        if group == 1:
            return step(tile_at(i), 0, carry, masked=masked)
        return step(tile_at(jax.lax.rem(i, count)), jax.lax.div(i, count), carry, masked=masked)

    return jax.lax.fori_loop(0, count * group, nth, carry)


def seen_in(mask, batch, start_q, start_k, blocks, *, transposed=False):
    """The visible scores of a tile, as booleans. Queries and keys past the ends of the arrays are masked."""
    down, across = (slice(None), None), (None, slice(None))
    of_queries, of_keys = (across, down) if transposed else (down, across)
    example = row_of(mask.start, batch)
    queries = lambda ref: load_row(ref, example, start=start_q, block=blocks.block_q)[of_queries]
    key = rows(start_k, blocks.block_k)[of_keys]
    seen = (queries(mask.start) <= key) & (key < queries(mask.end))
    if mask.k_private is None:
        return seen
    k_private = load_row(mask.k_private, example, start=start_k, block=blocks.block_k)[of_keys]
    return seen & ((k_private == 0) | (k_private == queries(mask.q_private)))
