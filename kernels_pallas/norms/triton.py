"""modulated_norm with Pallas-Triton: a program holds whole rows of one example in registers.

Refs are whole arrays and every access carries its mask: JAX 0.11 masks no block that hangs over an edge on
the chip. The forward keeps mean and rstd. The backward reads x and d_y once: a program walks ROWS_PER_PROGRAM
rows, writes their d_x and their sums of d_scale and d_shift; a second stage adds those in a fixed order: no
atomics.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from .. import backend
from . import cost


MAX_WIDTH = 8192
# Of the backward. Partial sums take 16 bytes a column and program, written and read; a row of bfloat16 6: at
# 32 rows that adds 8 %, and 8,192 rows still make 256 programs for the 132 processors of an H200.
ROWS_PER_PROGRAM = 32


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program holds in registers at once."""

    rows: int
    width: int  # of a row, padded: Triton takes powers of two only
    num_warps: int


def tile_for(width: int, elements: int) -> Tile:
    """Eight columns a thread, one 16-byte load of bfloat16, and rows until a thread holds `elements`."""
    block = pl.next_power_of_2(width)
    num_warps = min(max(block // (8 * 32), 1), 16)
    rows = min(max(elements * 32 * num_warps // block, 1), ROWS_PER_PROGRAM)
    return Tile(rows, block, num_warps)


def unsupported(x, scale, shift, *, kind, eps) -> str | None:
    """None, or why these arguments cannot run here."""
    del scale, shift, kind, eps
    if x.shape[-1] > MAX_WIDTH:
        return f"a row must fit in registers, D <= {MAX_WIDTH}, got {x.shape[-1]}"
    return backend.why_not_triton()


def forward(x, scale, shift, *, kind, eps):
    """(y, residuals); the residuals beside the inputs are two float32 a row."""
    B, T, D = x.shape
    tile = tile_for(D, elements=32)
    row = jax.ShapeDtypeStruct((B, T), jnp.float32)
    y, mean, rstd = pl.pallas_call(
        functools.partial(_forward_kernel, kind=kind, eps=eps, tile=tile),
        name="modulated_norm_forward",
        grid=(pl.cdiv(T, tile.rows), B),
        in_specs=[pl.BlockSpec()] * 3,
        out_specs=[pl.BlockSpec()] * 3,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), row, row],
        compiler_params=pltriton.CompilerParams(num_warps=tile.num_warps),
        cost_estimate=cost.forward(x, scale, shift, kind=kind, eps=eps).estimate(),
        interpret=backend.interpret(),
    )(x, scale, shift)
    return y, (x, scale, shift, mean, rstd)


def backward(residuals, d_y, *, kind, eps):
    """(d_x, d_scale, d_shift), each in its input's dtype."""
    x, scale, shift, mean, rstd = residuals
    B, T, D = x.shape
    tile = tile_for(D, elements=16)
    partial = jax.ShapeDtypeStruct((B, pl.cdiv(T, ROWS_PER_PROGRAM), D), jnp.float32)
    d_x, d_scale, d_shift = pl.pallas_call(
        functools.partial(_backward_kernel, kind=kind, tile=tile),
        name="modulated_norm_backward",
        grid=(partial.shape[1], B),
        in_specs=[pl.BlockSpec()] * 5,
        out_specs=[pl.BlockSpec()] * 3,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), partial, partial],
        compiler_params=pltriton.CompilerParams(num_warps=tile.num_warps),
        cost_estimate=cost.backward(x, scale, shift, kind=kind, eps=eps).estimate(),
        interpret=backend.interpret(),
    )(x, scale, mean, rstd, d_y)
    return d_x, d_scale.sum(axis=1).astype(scale.dtype), d_shift.sum(axis=1).astype(shift.dtype)


def _forward_kernel(x_ref, scale_ref, shift_ref, y_ref, mean_ref, rstd_ref, *, kind, eps, tile):
    D = x_ref.shape[-1]
    example = pl.program_id(1)
    columns, column_mask = _columns(tile, D)
    rows, row_mask = _rows(pl.program_id(0) * tile.rows, tile, x_ref.shape[1])
    mask = row_mask[:, None] & column_mask

    x = pltriton.load(x_ref.at[example, rows, columns], mask=mask, other=0.0).astype(jnp.float32)
    mean = x.sum(axis=1) / D if kind == "layer" else jnp.zeros(tile.rows, jnp.float32)
    centred = jnp.where(column_mask, x - mean[:, None], 0.0)
    rstd = jax.lax.rsqrt(jnp.sum(centred * centred, axis=1) / D + eps)
    scale = _load_row(scale_ref, example, columns, column_mask)
    shift = _load_row(shift_ref, example, columns, column_mask)
    y = centred * rstd[:, None] * (1.0 + scale) + shift

    pltriton.store(y_ref.at[example, rows, columns], y.astype(y_ref.dtype), mask=mask)
    pltriton.store(mean_ref.at[example, rows], mean, mask=row_mask)
    pltriton.store(rstd_ref.at[example, rows], rstd, mask=row_mask)


def _backward_kernel(x_ref, scale_ref, mean_ref, rstd_ref, d_y_ref, d_x_ref, d_scale_ref, d_shift_ref, *, kind, tile):
    T, D = x_ref.shape[1:]
    program, example = pl.program_id(0), pl.program_id(1)
    columns, column_mask = _columns(tile, D)
    gain = 1.0 + _load_row(scale_ref, example, columns, column_mask)

    def step(i, sums):
        d_scale, d_shift = sums
        rows, row_mask = _rows(program * ROWS_PER_PROGRAM + i * tile.rows, tile, T)
        mask = row_mask[:, None] & column_mask
        x = pltriton.load(x_ref.at[example, rows, columns], mask=mask, other=0.0).astype(jnp.float32)
        d_y = pltriton.load(d_y_ref.at[example, rows, columns], mask=mask, other=0.0).astype(jnp.float32)
        mean = pltriton.load(mean_ref.at[example, rows], mask=row_mask, other=0.0)[:, None]
        rstd = pltriton.load(rstd_ref.at[example, rows], mask=row_mask, other=0.0)[:, None]

        x_hat = (x - mean) * rstd
        g = d_y * gain  # zero outside the mask, as d_y is: x_hat need not be
        d_centred = g - x_hat * (jnp.sum(g * x_hat, axis=1, keepdims=True) / D)
        if kind == "layer":
            d_centred -= jnp.sum(g, axis=1, keepdims=True) / D
        d_x = (d_centred * rstd).astype(d_x_ref.dtype)
        pltriton.store(d_x_ref.at[example, rows, columns], d_x, mask=mask)
        return d_scale + jnp.sum(d_y * x_hat, axis=0), d_shift + jnp.sum(d_y, axis=0)

    zeros = jnp.zeros(tile.width, jnp.float32)
    d_scale, d_shift = jax.lax.fori_loop(0, ROWS_PER_PROGRAM // tile.rows, step, (zeros, zeros))
    pltriton.store(d_scale_ref.at[example, program, columns], d_scale, mask=column_mask[0])
    pltriton.store(d_shift_ref.at[example, program, columns], d_shift, mask=column_mask[0])


def _columns(tile, D):
    """The whole padded row, and which of it exists, as (1, width)."""
    mask = jnp.arange(tile.width, dtype=jnp.int32) < D
    return pl.ds(jnp.int32(0), tile.width), mask[None, :]


def _rows(start, tile, T):
    mask = start + jnp.arange(tile.rows, dtype=jnp.int32) < T
    return pl.ds(start, tile.rows), mask


def _load_row(ref, example, columns, column_mask):
    row = pltriton.load(ref.at[example, columns], mask=column_mask[0], other=0.0)
    return row.astype(jnp.float32)[None, :]
