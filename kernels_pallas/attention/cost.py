"""The work of attention: two matrix products forward, five backward, over the pairs that the mask leaves.

Each product takes 2 H flops a (query, key) pair and head: scores and output forward; scores again, d_weights,
d_v, d_q and d_k backward. So forward is 4 B N H pairs flops, where pairs = T S if nothing is masked, and
backward 2.5 times that. Each pair and head takes one exponential a pass. Bytes are one read of each input and
one write of each output; the log-sum-exp of the scores, float32 (B, N, T), is written forward and read
backward.
"""

from ..op import Cost


def forward(q, k, v, *, causal, scale) -> Cost:
    """4 B N H pairs flops; reads q, k, v, writes the output and its log-sum-exp."""
    del scale  # one multiplication a pair: not counted
    return _cost(q, k, causal, products=2, traffic=_size(q, k, v, q) + _statistic(q))


def backward(q, k, v, *, causal, scale) -> Cost:
    """10 B N H pairs flops; reads q, k, v, output, log-sum-exp and cotangent, writes d_q, d_k, d_v."""
    del scale
    return _cost(q, k, causal, products=5, traffic=_size(q, k, v, q, q) + _statistic(q) + _size(q, k, v))


def backward_dq(q, k, v, *, causal) -> Cost:
    """The kernel that computes scores, d_weights and d_q, and writes rowsum(out * d_out) for the other."""
    return _cost(q, k, causal, products=3, traffic=_size(q, k, v, q, q, q) + 2 * _statistic(q))


def backward_dkv(q, k, v, *, causal) -> Cost:
    """The kernel that computes scores and d_weights once more, d_v and d_k."""
    return _cost(q, k, causal, products=4, traffic=_size(q, k, v, q, k, v) + 2 * _statistic(q))


def visible_pairs(T: int, S: int, causal: bool) -> int:
    """How many (query, key) pairs of one head the mask leaves.

    Causal, the last n = min(T, S) queries see S - n + 1, ..., S keys and the others none:
    n (S - n) + n (n + 1) / 2.
    """
    n = min(T, S)
    return n * (S - n) + n * (n + 1) // 2 if causal else T * S


def _cost(q, k, causal: bool, *, products: int, traffic: int) -> Cost:
    B, T, N, H = q.shape
    pairs = B * N * visible_pairs(T, k.shape[1], causal)
    return Cost(flops=products * 2 * H * pairs, bytes=traffic, transcendentals=pairs)


def _size(*arrays) -> int:
    return sum(a.size * a.dtype.itemsize for a in arrays)


def _statistic(q) -> int:
    """Bytes of one float32 for each query and head."""
    return 4 * q.size // q.shape[-1]
