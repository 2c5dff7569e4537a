"""Cost model of the norms: the minimum work. All passes are memory-bound, with at most two flops per byte."""

import jax

from ..op import Cost


def forward(x, scale, shift, weight, *, kind, eps) -> Cost:
    """Reads x, scale, shift, weight; writes y, and the statistics of each row for the backward.

    Flops per element: square and add (2), * rstd (1), and those that apply of * weight (1), 1 + scale and its product
    (2), + shift (1); LayerNorm adds the sum for the mean and its subtraction (2).
    """
    del eps
    return Cost(
        flops=x.size * (3 + _of_modulation(scale, shift, weight) + 2 * (kind == "layer")),
        bytes=2 * _bytes(x) + _bytes((scale, shift, weight)) + _statistics(x, kind),
        transcendentals=x.size // x.shape[-1],
    )


def backward(x, scale, shift, weight, *, kind, eps) -> Cost:
    """Reads x, d_y, scale, weight and the statistics; writes d_x and the gradients of scale, shift and weight.

    Flops per element: x_hat (1), with a scale or a weight d_y * x_hat and its sum (2) and d_y * gain (at most 2), with
    a shift the sum of d_y (1), mean(g * x_hat) (2), d_x = rstd * (g - x_hat * mean) (3); LayerNorm adds x - mean, the
    sum of g, and its subtraction (3).
    """
    del eps
    gain = 4 * (scale is not None or weight is not None)
    return Cost(
        flops=x.size * (6 + gain + (shift is not None) + 3 * (kind == "layer")),
        bytes=3 * _bytes(x) + 2 * _bytes((scale, weight)) + _bytes(shift) + _statistics(x, kind),
    )


def residual_forward(x, branch, gate, scale, shift, weight, *, kind, eps) -> Cost:
    """As `forward`; also reads branch and gate and writes x_new, with a product and a sum per element (2 flops)."""
    norm = forward(x, scale, shift, weight, kind=kind, eps=eps)
    moved = norm.bytes + 2 * _bytes(branch) + _bytes(gate)
    return Cost(norm.flops + 2 * x.size, moved, norm.transcendentals)


def residual_backward(x, branch, gate, scale, shift, weight, *, kind, eps) -> Cost:
    """As `backward`; also reads branch, gate and d_x_new and writes d_branch and d_gate.

    There are four more flops per element: + d_x_new, * gate, and the product and sum of d_gate.
    """
    norm = backward(x, scale, shift, weight, kind=kind, eps=eps)
    return Cost(norm.flops + 4 * x.size, norm.bytes + _bytes(x) + 2 * _bytes((branch, gate)))


def _of_modulation(scale, shift, weight) -> int:
    return 2 * (scale is not None) + (shift is not None) + (weight is not None)


def _bytes(arrays) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays))


def _statistics(x, kind) -> int:
    """Bytes of the statistics: rstd of each row in float32, and for LayerNorm also the mean."""
    return 4 * (1 + (kind == "layer")) * (x.size // x.shape[-1])
