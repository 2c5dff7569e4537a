"""Cost model of linear cross-entropy: one product for the logits; in the backward that product and two more."""

from ..op import Cost


def forward(x, w, labels, **static) -> Cost:
    """x w, and one exponential per logit; reads x, w and labels, writes the loss and the logsumexp of each row."""
    del static
    (R, D), V = x.shape, w.shape[1]
    return Cost(2 * R * D * V, _bytes(x, w, labels) + 8 * R, transcendentals=R * V)


def backward(x, w, labels, **static) -> Cost:
    """Recomputes the logits, which are not kept, and computes the gradients of x and w.

    Reads x, w, labels, the logsumexp and both cotangents; writes d_x and d_w.
    """
    del static
    (R, D), V = x.shape, w.shape[1]
    return Cost(6 * R * D * V, 2 * _bytes(x, w) + _bytes(labels) + 12 * R, transcendentals=R * V)


def part(flops: int, *moved, transcendentals: int) -> Cost:
    """The cost of one kernel: `moved` are the arrays that it reads or writes once."""
    return Cost(flops, _bytes(*moved), transcendentals)


def _bytes(*arrays) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)
