"""The work of attention to a cache: one read of the keys and values that are there.

With `keys` the lengths added up over the examples: a query head and a key take 2 H flops for their score and 2 H for
the sum of values, so 4 N H keys in all, and N keys exponentials. Keys and values are 2 K H numbers a key, and a byte
of bfloat16 has N / K flops where a GPU could do hundreds: bandwidth alone is the limit. Lengths whose values are not
known, as when tracing, count as what the cache can hold.
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
    """The same, and one read of the table's entries below the lengths."""
    del v_pages, options
    (B, J), W = block_table.shape, k_pages.shape[1]
    known = _known(lengths, B, J * W)
    entries = int((-(-known // W)).sum())
    return _cost(q, k_pages, known, traffic=_size(q, lengths, q) + entries * block_table.dtype.itemsize)


def merge(q, splits: int) -> Cost:
    """The kernel that adds up the parts: each an output and its log-sum-exp, float32; 2 flops a number of them."""
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
    """The lengths, or `most` for each of B examples where their values are not known."""
    if isinstance(lengths, Tracer | jax.ShapeDtypeStruct):
        return np.full(B, most, np.int64)
    return np.asarray(lengths, np.int64)


def _size(*arrays) -> int:
    return sum(a.size * a.dtype.itemsize for a in arrays)
