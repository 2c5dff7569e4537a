"""Grouped GEMM in Pallas-Triton: a program computes one tile of one expert's rows, from a list of row tiles.

The list has as many entries as any group sizes can need (tiles.py). A grid over experts and row tiles would be mostly
empty with many experts. The matrix of an expert is read in place, also by the backward for x, which needs it
transposed. The backward for w contracts the rows of an expert. If there are few experts, several programs share an
expert's rows, and their partial sums are added in a fixed order: there are no atomics, and results are
bit-reproducible.

Source: MegaBlocks, https://arxiv.org/abs/2211.15841, section 5, without its padding of groups.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .. import backend
from ..hardware import by_device_kind
from ..pallas.triton import dot, run
from ..pallas.triton_tiles import (
    Columns,
    Rows,
    load_matrix,
    load_places,
    store_matrix,
    store_rows,
    tile_of_program,
    walk,
)
from . import cost
from .blocks import NAMES, blocks_for
from .programs import place
from .tiles import row_tiles


DTYPES = ("bfloat16", "float16", "float32")
USUAL_CORES = 132  # the SMs of an H200, assumed for a device that hardware.py does not know
ROWS_A_SPLIT = 512  # the fewest rows per split: with fewer, writing and adding partial sums costs more than it saves
MOST_SPLITS = 8


def unsupported(x, w, group_sizes) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del w, group_sizes
    if x.dtype.name not in DTYPES:
        return f"needs a dtype among {', '.join(DTYPES)}, got {x.dtype}"
    return backend.why_not_triton()


def forward(x, w, group_sizes):
    """The products, and the arguments as residuals."""
    return product(x, w, group_sizes, kernel="forward", rest=True), (x, w, group_sizes)


def backward(residuals, d_y):
    """d_x and d_w."""
    x, w, group_sizes = residuals
    d_x = product(d_y, w, group_sizes, kernel="dx", transposed=True, rest=True)
    return d_x, weight_gradient(x, d_y, group_sizes, kernel="dw"), None


def product(x, w, group_sizes, *, kernel: str, transposed: bool = False, rest: bool = False):
    """x[r] w[e] for each row and its expert, or x[r] w[e]^T; `rest` also writes zeros to the padding rows."""
    R, depth = x.shape
    width = w.shape[1 if transposed else 2]
    blocks = blocks_for(kernel, x.dtype, depth, width, R // w.shape[0])
    tiles = row_tiles(group_sizes, R, blocks.rows, rest=rest)
    out = jax.ShapeDtypeStruct((R, width), x.dtype)
    return run(
        functools.partial(_product_kernel, transposed=transposed, blocks=blocks),
        *(x, w, tiles),
        name=NAMES[kernel],
        programs=tiles.start.size * pl.cdiv(width, blocks.columns),
        blocks=blocks,
        out_shape=out,
        work=cost.part(2 * R * depth * width, x, w, out),
    )


def weight_gradient(x, d_y, group_sizes, *, kernel: str, x_index=None, d_y_index=None):
    """The sum over each expert's rows r of x[r]^T d_y[r], (E, D, F). With an index, row r is read at index[r]."""
    (_, D), (_, F), E = x.shape, d_y.shape, group_sizes.size
    R = x.shape[0] if x_index is None else x_index.size
    blocks = blocks_for(kernel, x.dtype, D, F, R // E)
    tiles = pl.cdiv(D, blocks.rows) * pl.cdiv(F, blocks.columns)
    splits = _splits(E * tiles, R // E)
    part = jax.ShapeDtypeStruct((splits, E, D, F), x.dtype if splits == 1 else jnp.float32)
    parts = run(
        functools.partial(_weight_gradient_kernel, blocks=blocks),
        *(x, d_y, x_index, d_y_index, lax.cumsum(group_sizes.astype(jnp.int32))),
        name=NAMES[kernel],
        programs=E * splits * tiles,
        blocks=blocks,
        out_shape=part,
        work=cost.part(2 * R * D * F, x, d_y, part),
    )
    return parts[0] if splits == 1 else parts.sum(axis=0).astype(x.dtype)


def _splits(programs: int, rows: int) -> int:
    """The number of programs that share the rows of an expert: enough to fill the GPU, if there are enough rows."""
    known = by_device_kind(backend.target().kind)
    wanted = pl.cdiv(known.cores if known else USUAL_CORES, programs)
    return max(min(wanted, rows // ROWS_A_SPLIT, MOST_SPLITS), 1)


def _product_kernel(x_ref, w_ref, tiles, out_ref, *, transposed, blocks):
    expert, rows, columns, enabled = place(tiles, w_ref.shape[0], out_ref.shape[1], blocks)
    places = rows.places(None, x_ref.shape[0])

    def step(depth, acc):
        x = load_places(x_ref, places, depth)
        w = load_matrix(w_ref, *((columns, depth) if transposed else (depth, columns)), expert)
        return acc + dot(x, w, trans_b=transposed)

    acc = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
    store_rows(out_ref, rows, columns, walk(x_ref.shape[1], blocks.depth, enabled, step, acc))


def _weight_gradient_kernel(x_ref, d_y_ref, x_index, d_y_index, ends_ref, out_ref, *, blocks):
    """One tile of the gradient of one expert's matrix, over one split of its rows; exactly zero without rows."""
    splits, _, D, F = out_ref.shape
    num_rows = (x_ref if x_index is None else x_index).shape[0]
    down, across = pl.cdiv(D, blocks.rows), pl.cdiv(F, blocks.columns)
    rest = lax.div(pl.program_id(0), down * across)
    expert, split = lax.div(rest, splits), lax.rem(rest, splits)
    row, column = tile_of_program(lax.rem(pl.program_id(0), down * across), down, across)
    inputs = Columns(row * blocks.rows, blocks.rows, D)
    outputs = Columns(column * blocks.columns, blocks.columns, F)

    begin = jnp.where(expert == 0, 0, ends_ref[jnp.maximum(expert - 1, 0)])
    end = jnp.minimum(ends_ref[expert], num_rows)
    steps = pl.cdiv(end - begin, blocks.depth)
    first, last = (lax.div((split + i) * steps, splits) for i in (0, 1))

    def step(i, acc):
        rows = Rows(begin + i * blocks.depth, end, blocks.depth)
        x = load_places(x_ref, rows.places(x_index, num_rows), inputs, exist=rows.exist)
        d_y = load_places(d_y_ref, rows.places(d_y_index, num_rows), outputs, exist=rows.exist)
        return acc + dot(x, d_y, trans_a=True)

    acc = lax.fori_loop(first, last, step, jnp.zeros((blocks.rows, blocks.columns), jnp.float32))
    store_matrix(out_ref, inputs, outputs, acc, split, expert)
