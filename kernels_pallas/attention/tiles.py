"""Block-sparse tile lists of an attention mask: kernels skip hidden tiles and mask only partially visible ones.

A tile is block_q queries by block_k keys. The minima and maxima of the mask's vectors over each block classify a tile
as fully visible (no score is masked), partially visible, or hidden. A program loops over a list of tiles: first the
fully visible ones, then the partially visible ones. The forward and the d_q kernel have one list per query block, the
d_k/d_v kernel one per key block.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .mask import AttentionMask


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The lists: row i has the fully visible tiles order[m, i, :whole[m, i]] and the partially visible tiles
    order[m, i, whole[m, i]:seen[m, i]]."""

    order: Any  # int32 (M, rows, columns), a permutation of the columns in each row
    whole: Any  # int32 (M, rows): the number of fully visible tiles
    seen: Any  # int32 (M, rows): the number of visible tiles, fully or partially


jax.tree_util.register_dataclass(Tiles, data_fields=("order", "whole", "seen"), meta_fields=())


def key_tiles(mask: AttentionMask, block_q: int, block_k: int) -> Tiles:
    """For each query block, the key blocks that are visible to it; M is that of the mask."""
    return _lists(*_classes(mask, block_q, block_k))


def query_tiles(mask: AttentionMask, block_q: int, block_k: int) -> Tiles:
    """For each key block, the query blocks that it is visible to."""
    return _lists(*(jnp.swapaxes(x, 1, 2) for x in _classes(mask, block_q, block_k)))


def _classes(mask: AttentionMask, block_q: int, block_k: int) -> tuple[jax.Array, jax.Array]:
    """(whole, seen), bool (M, query blocks, key blocks). `seen` may be true of a tile without visible scores."""
    sees = mask.start < mask.end  # queries without visible keys do not extend the range of their block
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
    """The minimum and maximum over each block of (M, length); the last block may be shorter."""
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
