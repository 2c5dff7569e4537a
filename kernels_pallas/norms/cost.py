"""Work that no implementation of the norms avoids. Both passes are bound by memory: two flops a byte."""

from ..op import Cost


def forward(x, scale, shift, *, kind, eps) -> Cost:
    """Reads x, scale, shift; writes y, and mean and rstd of each row for the backward.

    An element takes: square and add (2), * rstd, * (1 + scale), + shift (3); LayerNorm adds the sum for the
    mean and its subtraction (2).
    """
    del eps
    return Cost(
        flops=x.size * (7 if kind == "layer" else 5),
        bytes=2 * _bytes(x) + _bytes(scale) + _bytes(shift) + _statistics(x),
        transcendentals=x.size // x.shape[-1],
    )


def backward(x, scale, shift, *, kind, eps) -> Cost:
    """Reads x, d_y, scale, mean, rstd; writes d_x, d_scale, d_shift.

    An element takes: x_hat (1), d_shift (1), d_scale (2), g = d_y * (1 + scale) (1), mean(g * x_hat) (2),
    d_x = rstd * (g - x_hat * mean) (3); LayerNorm adds x - mean, the sum of g, and its subtraction (3).
    """
    del eps
    return Cost(
        flops=x.size * (13 if kind == "layer" else 10),
        bytes=3 * _bytes(x) + 2 * _bytes(scale) + _bytes(shift) + _statistics(x),
    )


def _bytes(array) -> int:
    return array.size * array.dtype.itemsize


def _statistics(x) -> int:
    return 2 * 4 * (x.size // x.shape[-1])  # mean and rstd of a row, float32
