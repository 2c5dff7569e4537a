"""DP-SGD kernels in Pallas-Triton, ghost norms and clipped sums: no per-example gradient is written to memory.

There are two algorithms for a squared norm; `cost.pairs_are_fewer` chooses the one with fewer flops. By pairs of rows,

    ||sum_t a_t g_t^T||^2 = sum_{t,s} <a_t, a_s> <g_t, g_s>,

a program has one tile of pairs: it computes the two products, multiplies them elementwise and sums. Of the tiles off
the diagonal only those on one side are computed, and counted twice. Pairs across groups are masked. A tile without a
pair within a group is skipped, so if rows are sorted by group, the cost is that of the pairs within groups. All calls
with groups use this algorithm, because by matrix a program would have to search for the rows of each group. By matrix,
a program has one tile of A^T G: it contracts all rows of the example, squares and sums. In both algorithms a program
writes one number, and a second stage adds the numbers of an example in a fixed order, without atomics.

A program of clip_reduce has a tile of the sum and loops over examples: it computes the example's product in float32,
multiplies it by c and adds it to the sum. Scaling g before the product would round c g to its dtype (a relative error
of 2^-9 in bfloat16), and an example could exceed its clip norm. The second accumulator takes registers, and one
multiply-add per element for each 2 T flops of the product. An example with c = 0 is not read. If there are few tiles,
several programs share the examples, as in experts/triton.py.

Source: by pairs, Goodfellow, arXiv 1510.01799, for one row, and Li et al., arXiv 2110.05679, section 4, for several;
the choice between both, Bu et al., arXiv 2205.10683; clipped sums by a second product, Bu et al., arXiv 2210.00038.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from .. import backend
from ..pallas.triton import dot, run
from ..pallas.triton_tiles import Columns, load_matrix, store_matrix, tile_of_program, walk
from . import cost, rounding
from .blocks import NAMES, blocks_for, cores


DTYPES = ("bfloat16", "float16", "float32")
ROWS_A_SPLIT = 512  # the fewest rows per split: with fewer, writing and adding partial sums costs more than it saves
MOST_SPLITS = 8


def norm_unsupported(a, g, groups, *, bias) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del groups, bias
    if a.shape[1] == 1:
        return "needs at least two rows per example, got T = 1, for which XLA's sums of squares are fast"
    return _wrong_dtype(a, g) or backend.why_not_triton()


def clip_unsupported(a, g, c) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del c
    return _wrong_dtype(a, g) or backend.why_not_triton()


def _wrong_dtype(a, g) -> str | None:
    if a.dtype.name not in DTYPES or g.dtype != a.dtype:
        return f"needs a and g in one dtype among {', '.join(DTYPES)}, got {a.dtype} and {g.dtype}"
    return None


def norm_forward(a, g, groups, *, bias):
    """The squared norms and their bounds, and the arguments as residuals."""
    T, D, F = *a.shape[1:], g.shape[2]
    counts = True if groups is None else groups >= 0
    lengths = rounding.lengths(a, counts, ones=bias), rounding.lengths(g, counts)
    spread = jnp.sum(lengths[0] * lengths[1], axis=1)
    if groups is not None or cost.pairs_are_fewer(T, D, F):
        squares, error = _by_pairs(a, g, groups, lengths, bias)
    else:
        squares = _by_matrix(a, g)
        if bias:
            squares += jnp.sum(jnp.square(jnp.sum(g, axis=1, dtype=jnp.float32)), axis=1)
        error, spread = rounding.of_sum(D * F) * squares, 2 * spread
    return (squares, rounding.upper_bound(squares, error, spread, T)), (a, g, groups)


def _by_pairs(a, g, groups, lengths, bias: bool):
    """The squared norms by pairs of rows, and bounds of their errors; negative results of rounding are clipped to 0."""
    (B, T, D), F = a.shape, g.shape[2]
    blocks = blocks_for("pairs", a, g, groups is not None)
    tiles = pl.cdiv(T, blocks.rows)
    out = jax.ShapeDtypeStruct((B, tiles * (tiles + 1) // 2), jnp.float32)
    parts = run(
        functools.partial(_pairs_kernel, bias=bias, blocks=blocks),
        *(a, g, groups, *lengths),
        name=NAMES["pairs"],
        programs=out.size,
        blocks=blocks,
        out_shape=(out, out),
        work=cost.part(B * T * (T + 1) * (D + F), a, g, out),
    )
    squares, error = (jnp.sum(part, axis=1) for part in parts)
    return jnp.maximum(squares, 0.0), error


def _by_matrix(a, g):
    """The squared norms (B,) by the matrix A^T G."""
    (B, T, D), F = a.shape, g.shape[2]
    blocks = blocks_for("matrix", a, g)
    out = jax.ShapeDtypeStruct((B, pl.cdiv(D, blocks.rows) * pl.cdiv(F, blocks.columns)), jnp.float32)
    parts = run(
        functools.partial(_matrix_kernel, blocks=blocks),
        *(a, g),
        name=NAMES["matrix"],
        programs=out.size,
        blocks=blocks,
        out_shape=out,
        work=cost.part(2 * B * T * D * F, a, g, out),
    )
    return jnp.sum(parts, axis=1)


def clip_forward(a, g, c):
    """The sum of clipped gradients, and the arguments as residuals."""
    (B, T, D), F = a.shape, g.shape[2]
    blocks = blocks_for("clip", a, g)
    tiles = pl.cdiv(D, blocks.rows) * pl.cdiv(F, blocks.columns)
    out = jax.ShapeDtypeStruct((_splits(tiles, B, T), D, F), jnp.float32)
    parts = run(
        functools.partial(_clip_kernel, blocks=blocks),
        *(a, g, c.astype(jnp.float32)),
        name=NAMES["clip"],
        programs=out.shape[0] * tiles,
        blocks=blocks,
        out_shape=out,
        work=cost.part(2 * B * T * D * F, a, g, c, out),
    )
    return parts[0] if out.shape[0] == 1 else jnp.sum(parts, axis=0), (a, g, c)


def _splits(programs: int, B: int, T: int) -> int:
    """The number of programs that share the examples: enough to fill the GPU, if there are enough rows."""
    wanted = pl.cdiv(cores(), programs)
    return max(min(wanted, B * T // ROWS_A_SPLIT, B, MOST_SPLITS), 1)


def _pairs_kernel(a_ref, g_ref, groups_ref, a_lengths_ref, g_lengths_ref, out_ref, error_ref, *, bias, blocks):
    """A tile of pairs (t, s) of one example: row tiles at cyclic distance k, for k up to half the number of tiles."""
    T, tiles = a_ref.shape[1], pl.cdiv(a_ref.shape[1], blocks.rows)
    example, pair = (f(pl.program_id(0), out_ref.shape[1]) for f in (lax.div, lax.rem))
    apart, first = (f(pair, tiles) for f in (lax.div, lax.rem))
    t, s = (Columns(lax.rem(tile, tiles) * blocks.rows, blocks.rows, T) for tile in (first, first + apart))

    same, enabled = True, True
    if groups_ref is not None:
        of_t, of_s = (_by_row(groups_ref, example, rows, -1) for rows in (t, s))
        same = (of_t[:, None] == of_s[None, :]) & (of_t >= 0)[:, None]
        enabled = jnp.max(same.astype(jnp.int32)) > 0

    def products(ref, start: float):
        def step(depth, acc):
            return acc + dot(load_matrix(ref, t, depth, example), load_matrix(ref, s, depth, example), trans_b=True)

        return walk(ref.shape[2], blocks.depth, enabled, step, jnp.full((blocks.rows, blocks.rows), start, jnp.float32))

    of_a, of_g = products(a_ref, 1.0 if bias else 0.0), products(g_ref, 0.0)  # a bias is a column of ones of a
    lengths = ([_by_row(ref, example, rows, 0.0) for rows in (t, s)] for ref in (a_lengths_ref, g_lengths_ref))
    of_lengths = tuple(of_t[:, None] * of_s[None, :] for of_t, of_s in lengths)
    error = rounding.of_pairs(of_a, of_g, of_lengths, (T, a_ref.shape[2], g_ref.shape[2]))
    for ref, both in ((out_ref, of_a * of_g), (error_ref, error)):
        if groups_ref is not None:
            both = jnp.where(same, both, 0.0)  # padding rows may be NaN; this affects only their own pairs
        total = jnp.sum(both)
        ref[example, pair] = jnp.where(apart == 0, total, total + total)


def _by_row(ref, example, rows, absent):
    """The numbers of the rows, of an array (B, T); `absent` past the last row."""
    exist = rows.exist
    other = None if exist is None else ref.dtype.type(absent)
    return pltriton.load(ref.at[example, rows.at], mask=exist, other=other)


def _tile(program, D: int, F: int, blocks):
    """(rows, columns) of the program's tile of the matrix."""
    row, column = tile_of_program(program, pl.cdiv(D, blocks.rows), pl.cdiv(F, blocks.columns))
    return Columns(row * blocks.rows, blocks.rows, D), Columns(column * blocks.columns, blocks.columns, F)


def _product(a_ref, g_ref, example, inputs, outputs, enabled, blocks):
    """A tile of one example's A^T G; if `enabled` is false, zeros, and nothing is read."""

    def step(rows, acc):
        a, g = load_matrix(a_ref, rows, inputs, example), load_matrix(g_ref, rows, outputs, example)
        return acc + dot(a, g, trans_a=True)

    acc = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
    return walk(a_ref.shape[1], blocks.depth, enabled, step, acc)


def _matrix_kernel(a_ref, g_ref, out_ref, *, blocks):
    example, tile = (f(pl.program_id(0), out_ref.shape[1]) for f in (lax.div, lax.rem))
    inputs, outputs = _tile(tile, a_ref.shape[2], g_ref.shape[2], blocks)
    out_ref[example, tile] = jnp.sum(jnp.square(_product(a_ref, g_ref, example, inputs, outputs, True, blocks)))


def _clip_kernel(a_ref, g_ref, c_ref, out_ref, *, blocks):
    """A tile of the sum over one split of the examples."""
    splits, D, F = out_ref.shape
    split, tile = (
        f(pl.program_id(0), pl.cdiv(D, blocks.rows) * pl.cdiv(F, blocks.columns)) for f in (lax.div, lax.rem)
    )
    inputs, outputs = _tile(tile, D, F, blocks)
    first, last = (lax.div((split + i) * a_ref.shape[0], splits) for i in (0, 1))

    def step(example, acc):
        c = c_ref[example]
        return acc + c * _product(a_ref, g_ref, example, inputs, outputs, c != 0, blocks)

    acc = lax.fori_loop(first, last, step, jnp.zeros((blocks.rows, blocks.columns), jnp.float32))
    store_matrix(out_ref, inputs, outputs, acc, split)
