"""Cost model of QK-norm and RoPE: one read and one write of all heads, with at most two flops per byte."""

import jax

from ..op import Cost


def forward(qkv, q_weight, k_weight, rotation, *, interleaved, eps) -> Cost:
    """Reads qkv, the weights and the rotation; writes q, k and v.

    Flops per element of q or k: with normalisation square and add (2) and * rstd * weight (2); with RoPE two products
    and a sum (3).
    """
    del interleaved, eps
    return Cost(
        flops=_turned(qkv) * (4 * (q_weight is not None) + 3 * (rotation is not None)),
        bytes=2 * _bytes(qkv) + _bytes((q_weight, k_weight, rotation)),
        transcendentals=_turned(qkv) // qkv.shape[-1] * (q_weight is not None),
    )


def backward(qkv, q_weight, k_weight, rotation, *, interleaved, eps) -> Cost:
    """Reads d_q, d_k, d_v, the weights and the rotation, and with normalisation q and k; writes d_qkv and the
    gradients of the weights.

    Flops per element: the inverse rotation (3); the recomputed norm (3), d_weight (2), g = d * weight (1),
    mean(g * x_hat) (2) and d_x (3).
    """
    del interleaved, eps
    normed = q_weight is not None
    return Cost(
        flops=_turned(qkv) * (11 * normed + 3 * (rotation is not None)),
        bytes=2 * _bytes(qkv)
        + _turned(qkv) * qkv.dtype.itemsize * normed
        + _bytes((q_weight, q_weight, k_weight, k_weight, rotation)),
        transcendentals=_turned(qkv) // qkv.shape[-1] * normed,
    )


def _turned(qkv) -> int:
    """The number of elements of q and k."""
    return qkv.size // qkv.shape[3] * (qkv.shape[3] - 1)


def _bytes(arrays) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays))
