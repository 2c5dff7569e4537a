"""Cost model of decode attention: one read of the keys and values below the lengths.

Let `keys` be the sum of the lengths. A query head and a key take 2 H flops for the score and 2 H for the sum of values,
so there are 4 N H keys flops and N keys exponentials. Keys and values are 2 K H numbers per key. In bfloat16 that is
N / K flops per byte, far below what a GPU can do: decode attention is memory-bound. If the lengths are not known, as
while tracing, the capacity of the cache is counted.
"""

import jax
import numpy as np
from jax.core import Tracer

from ..op import Cost


def forward(q, k_cache, v_cache, lengths, **options) -> Cost:
    """4 N H keys flops; reads q, the lengths, the keys and values below them; writes the output."""
    del v_cache, options
    return _cost(q, k_cache, _known(lengths, *k_cache.shape[:2]), traffic=_size(q, lengths, q))


def paged_forward(q, k_pages, v_pages, block_table, lengths, **options) -> Cost:
    """As `forward`, plus one read of the block table's entries below the lengths."""
    del v_pages, options
    (B, J), W = block_table.shape, k_pages.shape[1]
    known = _known(lengths, B, J * W)
    entries = int((-(-known // W)).sum())
    return _cost(q, k_pages, known, traffic=_size(q, lengths, q) + entries * block_table.dtype.itemsize)


def merge(q, splits: int) -> Cost:
    """The merge kernel: reads the output and log-sum-exp of each split, float32; 2 flops per number."""
    heads = q.size // q.shape[-1]
    return Cost(
        flops=2 * splits * q.size,
        bytes=4 * splits * (q.size + heads) + _size(q),
        transcendentals=splits * heads,
    )


def _cost(q, k, lengths: np.ndarray, *, traffic: int) -> Cost:
    N, H = q.shape[1:]
    keys = int(lengths.sum())
    return Cost(
        flops=4 * N * H * keys,
        bytes=2 * k.shape[2] * H * k.dtype.itemsize * keys + traffic,
        transcendentals=N * keys,
    )


def _known(lengths, B: int, most: int) -> np.ndarray:
    """The lengths, or `most` for each of B examples if their values are not known."""
    if isinstance(lengths, Tracer | jax.ShapeDtypeStruct):
        return np.full(B, most, np.int64)
    return np.asarray(lengths, np.int64)


def _size(*arrays) -> int:
    return sum(a.size * a.dtype.itemsize for a in arrays)
