"""The work of attention: two matrix products forward, five backward, over the pairs that the mask leaves.

Each product takes 2 H flops a (query, key) pair and head: scores and output forward; scores again, d_weights,
d_v, d_q and d_k backward. So forward is 4 N H pairs flops, where pairs = B T S if nothing is masked, and
backward 2.5 times that. Each pair and head takes one exponential a pass. Bytes are one read of each input and
one write of each output; the log-sum-exp of the scores, float32 (B, N, T), is written forward and read
backward. Options cost nothing that is counted.
"""

import jax
import numpy as np

from ..op import Cost
from .mask import AttentionMask, known


def forward(q, k, v, mask, sinks, **options) -> Cost:
    """4 N H pairs flops; reads q, k, v, writes the output and its log-sum-exp."""
    del options
    return _cost(q, k, mask, products=2, traffic=_size(q, k, v, mask, sinks, q) + _statistic(q))


def backward(q, k, v, mask, sinks, **options) -> Cost:
    """10 N H pairs flops; reads q, k, v, output, log-sum-exp and cotangent, writes d_q, d_k, d_v."""
    del options
    return _cost(q, k, mask, products=5, traffic=_size(q, k, v, mask, sinks, q, q, q, k, v, sinks) + _statistic(q))


def backward_dq(q, k, v, mask) -> Cost:
    """The kernel that computes scores, d_weights and d_q, and writes rowsum(out * d_out) for the other."""
    return _cost(q, k, mask, products=3, traffic=_size(q, k, v, mask, q, q, q) + 2 * _statistic(q))


def backward_dkv(q, k, v, mask) -> Cost:
    """The kernel that computes scores and d_weights once more, d_v and d_k."""
    return _cost(q, k, mask, products=4, traffic=_size(q, k, v, mask, q, k, v) + 2 * _statistic(q))


def tangent_forward(q, k, v, mask, out, lse, *tangents, **options) -> Cost:
    """10 N H pairs flops: scores, their tangent (two products), and its two sums of values."""
    del options
    return _cost(q, k, mask, products=5, traffic=_size(q, k, v, mask, out, lse, tangents, out))


def tangent_backward(q, k, v, mask, out, lse, *tangents, **options) -> Cost:
    """The backward of attention itself, for the cotangents of t_q, t_k and t_v."""
    del options
    return _cost(q, k, mask, products=5, traffic=_size(q, k, v, mask, out, lse, out, tangents))


def without_values(mask: AttentionMask | None) -> AttentionMask | None:
    """Its shapes: what a kernel estimates its cost by, lest it be compiled anew for each mask."""
    return jax.eval_shape(lambda mask: mask, mask)


def visible_pairs(mask: AttentionMask | None, B: int, T: int, S: int) -> int:
    """How many (query, key) pairs of one head the mask leaves, over the batch; B T S where its values are not known.

    Of the keys in a query's range all are seen but the private ones of others: the sum of end - start, less the
    private keys in the range, plus those with the query's own number.
    """
    if mask is None or not all(known(a) for a in jax.tree.leaves(mask)):
        return B * T * S
    start, end = np.asarray(mask.start, np.int64), np.asarray(mask.end, np.int64)
    pairs = int((end - start).sum())
    if mask.k_private is not None:
        q_private, k_private = np.asarray(mask.q_private), np.asarray(mask.k_private)
        pairs -= _in_ranges(k_private != 0, start, end)
        for number in np.unique(k_private[k_private != 0]):
            own = q_private == number
            pairs += _in_ranges(k_private == number, np.where(own, start, 0), np.where(own, end, 0))
    return pairs * (B // start.shape[0])


def _in_ranges(counted, start, end) -> int:
    """How many of the keys that are counted lie in the queries' ranges."""
    before = np.pad(np.cumsum(counted, axis=1), ((0, 0), (1, 0)))
    return int((np.take_along_axis(before, end, axis=1) - np.take_along_axis(before, start, axis=1)).sum())


def _cost(q, k, mask, *, products: int, traffic: int) -> Cost:
    B, T, N, H = q.shape
    pairs = N * visible_pairs(mask, B, T, k.shape[1])
    return Cost(flops=products * 2 * H * pairs, bytes=traffic, transcendentals=pairs)


def _size(*arrays) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def _statistic(q) -> int:
    """Bytes of one float32 for each query and head."""
    return 4 * q.size // q.shape[-1]
