"""Which tiles of the scores a mask leaves: what lets a kernel skip some and spare others the mask.

A tile is block_q queries by block_k keys. From the minima and maxima of the mask's vectors over each block, a tile is
seen whole (no score in it is masked), in part, or not at all. A kernel walks, for its row of tiles, those seen whole
and then those seen in part, by a list. The forward and the backward for queries have a row a query block, the
backward for keys a row a key block.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .mask import AttentionMask


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Row i walks order[m, i, :whole[m, i]] without a mask, then order[m, i, whole[m, i]:seen[m, i]] with it."""

    order: Any  # int32 (M, rows, columns), a permutation of the columns in each row
    whole: Any  # int32 (M, rows)
    seen: Any  # int32 (M, rows), at least `whole`


jax.tree_util.register_dataclass(Tiles, data_fields=("order", "whole", "seen"), meta_fields=())


def key_tiles(mask: AttentionMask, block_q: int, block_k: int) -> Tiles:
    """For each query block, the key blocks it sees; M is the mask's."""
    return _lists(*_classes(mask, block_q, block_k))


def query_tiles(mask: AttentionMask, block_q: int, block_k: int) -> Tiles:
    """For each key block, the query blocks that see it."""
    return _lists(*(jnp.swapaxes(x, 1, 2) for x in _classes(mask, block_q, block_k)))


def _classes(mask: AttentionMask, block_q: int, block_k: int) -> tuple[jax.Array, jax.Array]:
    """(whole, seen), bool (M, query blocks, key blocks). `seen` may be true of a tile with nothing to see."""
    sees = mask.start < mask.end  # a query that sees nothing stretches no range
    start_min, start_max = _extremes(jnp.where(sees, mask.start, mask.num_keys), block_q)
    end_min, end_max = _extremes(jnp.where(sees, mask.end, 0), block_q)
    first = jnp.arange(0, mask.num_keys, block_k, dtype=jnp.int32)[None, None]
    last = first + block_k
    whole = (start_max[:, :, None] <= first) & (last <= end_min[:, :, None])
    seen = (start_min[:, :, None] < last) & (first < end_max[:, :, None])
    if mask.k_private is not None:
        q_min, q_max = (x[:, :, None] for x in _extremes(mask.q_private, block_q))
        k_min, k_max = (x[:, None, :] for x in _extremes(mask.k_private, block_k))
        whole &= (k_max == 0) | ((k_min == k_max) & (q_min == k_min) & (q_max == k_max))
        seen &= (k_min == 0) | ((q_min <= k_max) & (k_min <= q_max))
    return whole, seen


def _extremes(vector, block: int) -> tuple[jax.Array, jax.Array]:
    """Minimum and maximum over each block of (M, length); the last block may be short."""
    M, length = vector.shape
    blocks = jnp.pad(vector, ((0, 0), (0, -length % block)), mode="edge").reshape(M, -1, block)
    return blocks.min(axis=-1), blocks.max(axis=-1)


def _lists(whole, seen) -> Tiles:
    columns = whole.shape[2]
    rank = jnp.where(whole, 0, jnp.where(seen, 1, 2)).astype(jnp.int32)
    column = jnp.arange(columns, dtype=jnp.int32)[None, None]
    order = jnp.sort(rank * columns + column, axis=-1) % columns
    count = lambda x: jnp.sum(x, axis=-1, dtype=jnp.int32)
    return Tiles(order, count(whole), count(seen))
