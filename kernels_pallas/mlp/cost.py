"""Cost model of the MLPs: the minimum work, that is the products, one read of each input, one write of each output.

Writing and reading the pre-activations z is counted: the backward needs z, and would otherwise recompute the first
product.
"""

import jax

from ..op import Cost


def forward(x, w_up, *rest, activation) -> Cost:
    """The product with w_up (or gate and up), the activation, and the product with w_down.

    Reads all arrays, writes z and the output.
    """
    del activation
    (R, D), columns, F = x.shape, w_up.size // w_up.shape[0], w_up.shape[-1]
    return Cost(
        flops=2 * R * D * (columns + F),
        bytes=_bytes((x, w_up, rest, x)) + R * columns * x.dtype.itemsize,
        transcendentals=R * F,
    )


def backward(x, w_up, *rest, activation) -> Cost:
    """Twice the products of the forward: for the gradients of the inputs and of the matrices.

    Reads x, the matrices, z and d_out; writes d_x and the gradients of the matrices and biases.
    """
    del activation
    (R, D), columns, F = x.shape, w_up.size // w_up.shape[0], w_up.shape[-1]
    return Cost(
        flops=4 * R * D * (columns + F),
        bytes=_bytes((x, x, x, w_up, w_up, rest, rest)) + R * columns * x.dtype.itemsize,
        transcendentals=R * F,
    )


def part(flops: int, *moved, transcendentals: int) -> Cost:
    """The cost of one kernel: `moved` are the arrays that it reads or writes once."""
    return Cost(flops, _bytes(moved), transcendentals)


def _bytes(arrays) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays))
