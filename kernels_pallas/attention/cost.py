"""Cost model of attention: two matrix products forward and five backward, over the visible (query, key) pairs.

Each product takes 2 H flops per pair and head. Forward computes scores and output; backward recomputes the scores and
computes d_weights, d_v, d_q and d_k. So forward takes 4 N H pairs flops, where pairs = B T S without a mask, and
backward takes 2.5 times as many. Each pair and head takes one exponential per pass. Bytes are one read of each input
and one write of each output; the log-sum-exp of the scores, float32 (B, N, T), is written forward and read backward.
The work of the options (soft cap, sinks) is not counted.
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
    """The d_q kernel: scores, d_weights and d_q; it also writes rowsum(out * d_out) for the d_k/d_v kernel."""
    return _cost(q, k, mask, products=3, traffic=_size(q, k, v, mask, q, q, q) + 2 * _statistic(q))


def backward_dkv(q, k, v, mask) -> Cost:
    """The d_k/d_v kernel: scores, d_weights, d_v and d_k."""
    return _cost(q, k, mask, products=4, traffic=_size(q, k, v, mask, q, k, v) + 2 * _statistic(q))


def tangent_forward(q, k, v, mask, out, lse, *tangents, **options) -> Cost:
    """10 N H pairs flops: scores, their tangent (two products), and two weighted sums of values."""
    del options
    return _cost(q, k, mask, products=5, traffic=_size(q, k, v, mask, out, lse, tangents, out))


def tangent_backward(q, k, v, mask, out, lse, *tangents, **options) -> Cost:
    """The same as the backward of attention; it gives the cotangents of t_q, t_k and t_v."""
    del options
    return _cost(q, k, mask, products=5, traffic=_size(q, k, v, mask, out, lse, out, tangents))


def without_values(mask: AttentionMask | None) -> AttentionMask | None:
    """The shapes of a mask. A cost estimate from its values would make every mask compile a new kernel."""
    return jax.eval_shape(lambda mask: mask, mask)


def visible_pairs(mask: AttentionMask | None, B: int, T: int, S: int) -> int:
    """The number of visible (query, key) pairs of one head, over the batch; B T S if the mask's values are not known.

    In its range a query sees all public keys and the private keys with its own number. So the count is the sum of
    end - start, minus the private keys in the ranges, plus those with the query's own number.
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
    """The number of keys with `counted` true in the ranges of the queries, summed over the queries."""
    before = np.pad(np.cumsum(counted, axis=1), ((0, 0), (1, 0)))
    return int((np.take_along_axis(before, end, axis=1) - np.take_along_axis(before, start, axis=1)).sum())


def _cost(q, k, mask, *, products: int, traffic: int) -> Cost:
    B, T, N, H = q.shape
    pairs = N * visible_pairs(mask, B, T, k.shape[1])
    return Cost(flops=products * 2 * H * pairs, bytes=traffic, transcendentals=pairs)


def _size(*arrays) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def _statistic(q) -> int:
    """Bytes of one float32 per query and head."""
    return 4 * q.size // q.shape[-1]
