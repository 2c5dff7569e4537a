"""Cost model of the MoE operations. Padding rows are not counted if the values of the group sizes are known.

A row takes 2 D F flops per product. The forward of the gated MLP has three products (gate, up, down), 6 D F flops; the
backward has twice as many and recomputes none. Bytes are one read of each input and one write of each output; a token
is read once, however many experts it has.
"""

import jax
import numpy as np
from jax.core import Tracer

from ..op import Cost


def dispatch_forward(x, routing) -> Cost:
    """Copies a token to each of its rows."""
    rows = _rows(routing.group_sizes, routing.row_index.shape[0])
    return Cost(flops=0, bytes=2 * rows * _row(x) + _size(routing))


def dispatch_backward(x, routing) -> Cost:
    """Sums the rows of each token."""
    rows = _rows(routing.group_sizes, routing.row_index.shape[0])
    return Cost(flops=rows * x.shape[1], bytes=rows * _row(x) + _size(x, routing))


def combine_forward(y, routing) -> Cost:
    """A weighted sum over the rows of each token."""
    rows, tokens = _rows(routing.group_sizes, y.shape[0]), routing.token_sizes.shape[0]
    return Cost(flops=2 * rows * y.shape[1], bytes=(rows + tokens) * _row(y) + _size(routing))


def combine_backward(y, routing) -> Cost:
    """d_y = weight d_out and d_weight = <y, d_out> of each row."""
    rows, tokens = _rows(routing.group_sizes, y.shape[0]), routing.token_sizes.shape[0]
    traffic = (2 * rows + tokens) * _row(y) + _size(routing, routing.row_weight)
    return Cost(flops=3 * rows * y.shape[1], bytes=traffic)


def matmul_forward(x, w, group_sizes) -> Cost:
    """2 D F flops per row."""
    rows = _rows(group_sizes, x.shape[0])
    _, D, F = w.shape
    return Cost(flops=2 * rows * D * F, bytes=rows * _row(x) + x.shape[0] * F * x.dtype.itemsize + _size(w))


def matmul_backward(x, w, group_sizes) -> Cost:
    """4 D F flops per row; reads x, w, d_y, writes d_x and d_w."""
    rows = _rows(group_sizes, x.shape[0])
    _, D, F = w.shape
    traffic = rows * (_row(x) + F * x.dtype.itemsize) + _size(x, w, w)
    return Cost(flops=4 * rows * D * F, bytes=traffic)


def mlp_forward(x, routing, w_gate_up, w_down) -> Cost:
    """6 D F flops and F exponentials per row; writes the output and the pre-activations (R, 2 F) for the backward."""
    rows = _rows(routing.group_sizes, routing.row_index.shape[0])
    _, F, D = w_down.shape
    return Cost(
        flops=rows * (6 * D * F + 4 * F + 2 * D),
        bytes=_size(x, x, routing, w_gate_up, w_down) + rows * 2 * F * x.dtype.itemsize,
        transcendentals=rows * F,
    )


def mlp_backward(x, routing, w_gate_up, w_down) -> Cost:
    """12 D F flops per row; reads the inputs, the pre-activations and d_out; writes the gradient of each input."""
    rows = _rows(routing.group_sizes, routing.row_index.shape[0])
    _, F, D = w_down.shape
    read = _size(x, x, routing, w_gate_up, w_down) + rows * 2 * F * x.dtype.itemsize
    return Cost(
        flops=rows * (12 * D * F + 10 * F + D),
        bytes=read + _size(x, w_gate_up, w_down, routing.row_weight),
        transcendentals=rows * F,
    )


def part(flops: int, *arrays, transcendentals: int = 0) -> Cost:
    """The cost of one kernel from the shapes of its inputs and outputs. Using values would recompile per routing."""
    return Cost(flops, _size(*arrays), transcendentals)


def _rows(group_sizes, most: int) -> int:
    known = isinstance(group_sizes, np.ndarray | jax.Array) and not isinstance(group_sizes, Tracer)
    return min(int(np.asarray(group_sizes).sum()), most) if known else most


def _row(x) -> int:
    return x.shape[-1] * x.dtype.itemsize


def _size(*arrays) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))
