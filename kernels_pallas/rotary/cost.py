"""Work that no implementation avoids: one read and one write of all heads; two flops a byte or fewer."""

import jax

from ..op import Cost


def forward(qkv, q_weight, k_weight, rotation, *, interleaved, eps) -> Cost:
    """Reads qkv, the weights and the rotation; writes q, k and v.

    An element of q or k takes: square and add (2), * rstd * weight (2) where it is normalised; two products and a sum
    (3) where it is turned.
    """
    del interleaved, eps
    return Cost(
        flops=_turned(qkv) * (4 * (q_weight is not None) + 3 * (rotation is not None)),
        bytes=2 * _bytes(qkv) + _bytes((q_weight, k_weight, rotation)),
        transcendentals=_turned(qkv) // qkv.shape[-1] * (q_weight is not None),
    )


def backward(qkv, q_weight, k_weight, rotation, *, interleaved, eps) -> Cost:
    """Reads d_q, d_k, d_v, the weights and the rotation, and q and k where they are normalised; writes d_qkv and
    the gradients of the weights.

    An element takes: the turn back (3); the norm again (3), d_weight (2), g = d * weight (1), mean(g * x_hat) (2)
    and d_x (3).
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
    """Elements of q and k."""
    return qkv.size // qkv.shape[3] * (qkv.shape[3] - 1)


def _bytes(arrays) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays))
