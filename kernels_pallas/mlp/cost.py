"""Work that no implementation avoids: the products, and one read and one write of what goes in and comes out.

That z, what is before the activation, goes to memory and back is counted: a backward needs it, and would else compute
the first product again.
"""

import jax

from ..op import Cost


def forward(x, w_up, *rest, activation) -> Cost:
    """x w_up, or gate and up; the activation; by w_down. Reads all arrays, writes z and the output."""
    del activation
    (R, D), columns, F = x.shape, w_up.size // w_up.shape[0], w_up.shape[-1]
    return Cost(
        flops=2 * R * D * (columns + F),
        bytes=_bytes((x, w_up, rest, x)) + R * columns * x.dtype.itemsize,
        transcendentals=R * F,
    )


def backward(x, w_up, *rest, activation) -> Cost:
    """Twice the products of the forward: to the inputs and to the matrices of both. Reads x, the matrices, z and
    d_out; writes d_x and the gradients of the rest."""
    del activation
    (R, D), columns, F = x.shape, w_up.size // w_up.shape[0], w_up.shape[-1]
    return Cost(
        flops=4 * R * D * (columns + F),
        bytes=_bytes((x, x, x, w_up, w_up, rest, rest)) + R * columns * x.dtype.itemsize,
        transcendentals=R * F,
    )


def part(flops: int, *moved, transcendentals: int) -> Cost:
    """Of one kernel: what it reads and writes once."""
    return Cost(flops, _bytes(moved), transcendentals)


def _bytes(arrays) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays))
