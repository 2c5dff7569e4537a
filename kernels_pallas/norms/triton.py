"""The fused norms in Pallas-Triton: a program holds whole rows of one example in registers.

There is one forward and one backward kernel. What an op does not have (branch, shift, the mean of RMSNorm) is None, and
its loads and sums are not compiled. Refs are whole arrays, and every access has a mask: on a GPU JAX 0.11 does not mask
blocks that extend past the edge of an array.

The forward keeps the statistics of each row as residuals. The backward reads each array once. A program loops over
ROWS_PER_PROGRAM rows, writes the gradients of each row, and writes its partial sums of the gradients that are shared by
rows; a second stage adds the partial sums in a fixed order, without atomics. The sum over tokens of
d_gain = d_y * x_hat gives the gradients of both scale and weight, because gain = weight * (1 + scale).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from .. import backend
from ..pallas.triton import run
from . import cost


MAX_WIDTH = 8192
DTYPES = ("bfloat16", "float16", "float32")
# Rows per program of the backward. Writing and reading partial sums takes 16 bytes per column and program; a row of
# bfloat16 takes 6. With 32 rows that adds 8 %, and 8,192 rows still make 256 programs for the 132 SMs of an H200.
ROWS_PER_PROGRAM = 32


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile of a program, which it holds in registers."""

    rows: int
    width: int  # the row width, padded to a power of two for Triton
    num_warps: int
    num_stages: int = 3


def tile_for(tokens: int, width: int, elements: int, most_warps: int) -> Tile:
    """A tile with eight columns per thread (one 16-byte load of bfloat16), and rows until a thread has `elements`.

    So in wide rows a thread holds all rows of its columns, and a sum over rows needs no communication.
    """
    block = pl.next_power_of_2(width)
    num_warps = min(max(block // (8 * 32), 1), most_warps)
    rows = min(max(elements * 32 * num_warps // block, 1), ROWS_PER_PROGRAM, pl.next_power_of_2(tokens))
    return Tile(rows, block, num_warps)


def unsupported(x, *arrays, kind, eps) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del kind, eps
    for array in (x, *arrays):
        if array is not None and array.dtype.name not in DTYPES:
            return f"needs dtypes among {', '.join(DTYPES)}, got {array.dtype}"
    if x.shape[-1] > MAX_WIDTH:
        return f"a row must fit in registers, D <= {MAX_WIDTH}, got {x.shape[-1]}"
    return backend.why_not_triton()


def forward(x, scale, shift, weight, *, kind, eps):
    """(y, residuals); the residuals are the inputs and the float32 statistics of each row."""
    work = cost.forward(x, scale, shift, weight, kind=kind, eps=eps)
    arrays = (x, None, None, scale, shift, weight)
    _, y, mean, rstd = _forward(*arrays, name="modulated_norm_forward", kind=kind, eps=eps, work=work)
    return y, (x, scale, shift, weight, mean, rstd)


def backward(residuals, d_y, *, kind, eps):
    """(d_x, d_scale, d_shift, d_weight), each in its input's dtype."""
    x, scale, shift, weight, mean, rstd = residuals
    work = cost.backward(x, scale, shift, weight, kind=kind, eps=eps)
    arrays = (x, None, None, scale, shift, weight, mean, rstd, None, d_y)
    d_x, _, _, *of_modulation = _backward(*arrays, name="modulated_norm_backward", work=work)
    return d_x, *of_modulation


def residual_forward(x, branch, gate, scale, shift, weight, *, kind, eps):
    """((x_new, y), residuals); the residuals hold x_new and branch, but not x."""
    work = cost.residual_forward(x, branch, gate, scale, shift, weight, kind=kind, eps=eps)
    arrays = (x, branch, gate, scale, shift, weight)
    x_new, y, mean, rstd = _forward(*arrays, name="gated_residual_norm_forward", kind=kind, eps=eps, work=work)
    return (x_new, y), (x_new, branch, gate, scale, shift, weight, mean, rstd)


def residual_backward(residuals, d_out, *, kind, eps):
    """(d_x, d_branch, d_gate, d_scale, d_shift, d_weight), each in its input's dtype."""
    work = cost.residual_backward(*residuals[:6], kind=kind, eps=eps)
    return _backward(*residuals, *d_out, name="gated_residual_norm_backward", work=work)


def _forward(x, branch, gate, scale, shift, weight, *, name, kind, eps, work):
    B, T, D = x.shape
    tile = tile_for(T, D, elements=64 // x.dtype.itemsize, most_warps=16)
    whole, row = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((B, T), jnp.float32)
    return run(
        functools.partial(_forward_kernel, kind=kind, eps=eps, tile=tile),
        *(x, branch, gate, scale, shift, weight),
        name=name,
        programs=B * pl.cdiv(T, tile.rows),
        blocks=tile,
        out_shape=[None if branch is None else whole, whole, row if kind == "layer" else None, row],
        work=work,
    )


def _backward(x, branch, gate, scale, shift, weight, mean, rstd, d_x_new, d_y, *, name, work):
    B, T, D = x.shape
    tile = tile_for(T, D, elements=16, most_warps=8)  # D = 8192 takes all 255 registers per thread
    whole = jax.ShapeDtypeStruct(x.shape, x.dtype)
    sums = jax.ShapeDtypeStruct((B, pl.cdiv(T, ROWS_PER_PROGRAM), D), jnp.float32)
    modulation = {k: v for k, v in dict(gate=gate, scale=scale, shift=shift).items() if v is not None}
    by_token = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in modulation.items() if v.ndim == 3}
    summed = {k: sums for k in ("gate", "shift") if k in modulation and k not in by_token}
    if weight is not None or (scale is not None and scale.ndim == 2):
        summed["gain"] = sums
    d_x, d_branch, d_tokens, partial = run(
        functools.partial(_backward_kernel, tile=tile),
        *(x, branch, gate, scale, weight, mean, rstd, d_x_new, d_y),
        name=name,
        programs=B * sums.shape[1],
        blocks=tile,
        out_shape=(whole, None if branch is None else whole, by_token, summed),
        work=work,
    )
    d = {k: part.sum(axis=1) for k, part in partial.items()}  # (B, D)
    d_weight = None
    if weight is not None:
        d_weight = d["gain"] if "scale" in d_tokens or scale is None else d["gain"] * (1 + scale.astype(jnp.float32))
        d_weight = d_weight.sum(axis=0).astype(weight.dtype)
    if scale is not None and scale.ndim == 2:
        d["scale"] = d["gain"] if weight is None else d["gain"] * weight.astype(jnp.float32)[None]
    d = {k: (d | d_tokens)[k].astype(v.dtype) for k, v in modulation.items()}
    return d_x, d_branch, d.get("gate"), d.get("scale"), d.get("shift"), d_weight


@dataclasses.dataclass(frozen=True)
class Place:
    """The index and masks of a program's rows of one example, with all their columns."""

    example: Any
    rows: Any
    row_mask: Any  # (rows,)
    columns: Any
    column_mask: Any  # (width,)

    @classmethod
    def of(cls, example, start, tile: Tile, T: int, D: int) -> "Place":
        """The rows from `start` on."""
        row_mask = start + jnp.arange(tile.rows, dtype=jnp.int32) < T
        column_mask = jnp.arange(tile.width, dtype=jnp.int32) < D
        columns = pl.ds(jnp.int32(0), tile.width)
        return cls(example, pl.ds(start, tile.rows), row_mask, columns, column_mask)

    @property
    def mask(self):
        return self.row_mask[:, None] & self.column_mask[None, :]

    def load(self, ref) -> Any:
        """Loads as float32, with zero outside: the rows of (B, T, D), the example's row of (B, D), or all of (D,)."""
        if ref is None:
            return None
        if len(ref.shape) == 3:
            at = ref.at[self.example, self.rows, self.columns]
            return pltriton.load(at, mask=self.mask, other=0.0).astype(jnp.float32)
        at = ref.at[self.example, self.columns] if len(ref.shape) == 2 else ref.at[self.columns]
        return pltriton.load(at, mask=self.column_mask, other=0.0).astype(jnp.float32)[None, :]

    def statistic(self, ref) -> jax.Array:
        """Loads one number per row of (B, T), as a column."""
        return pltriton.load(ref.at[self.example, self.rows], mask=self.row_mask, other=0.0)[:, None]

    def store(self, ref, value) -> None:
        """Stores to the rows of (B, T, D), or one number per row to (B, T)."""
        at, mask = ref.at[self.example, self.rows], self.row_mask
        if len(ref.shape) == 3:
            at, mask = ref.at[self.example, self.rows, self.columns], self.mask
        pltriton.store(at, value.astype(ref.dtype), mask=mask)


def _gain(scale, weight) -> Any:
    """weight * (1 + scale), without the factors that are None."""
    if scale is None or weight is None:
        return 1.0 if scale is weight is None else weight if scale is None else 1.0 + scale
    return weight * (1.0 + scale)


def _forward_kernel(
    x_ref, branch_ref, gate_ref, scale_ref, shift_ref, weight_ref, x_new_ref, y_ref, mean_ref, rstd_ref, *,
    kind, eps, tile,
):  # fmt: skip
    _, T, D = x_ref.shape
    program, programs = pl.program_id(0), pl.cdiv(T, tile.rows)
    place = Place.of(program // programs, program % programs * tile.rows, tile, T, D)

    x = place.load(x_ref)
    if branch_ref is not None:
        x = (x + place.load(gate_ref) * place.load(branch_ref)).astype(x_ref.dtype)
        place.store(x_new_ref, x)
        x = x.astype(jnp.float32)
    if kind == "layer":
        mean = jnp.sum(x, axis=1) / D
        place.store(mean_ref, mean)
        x = jnp.where(place.column_mask[None, :], x - mean[:, None], 0.0)
    rstd = jax.lax.rsqrt(jnp.sum(x * x, axis=1) / D + eps)
    place.store(rstd_ref, rstd)

    y = x * rstd[:, None] * _gain(place.load(scale_ref), place.load(weight_ref))
    place.store(y_ref, y if shift_ref is None else y + place.load(shift_ref))


def _backward_kernel(
    x_ref, branch_ref, gate_ref, scale_ref, weight_ref, mean_ref, rstd_ref, d_x_new_ref, d_y_ref,
    d_x_ref, d_branch_ref, d_token_refs, sum_refs, *, tile,
):  # fmt: skip
    _, T, D = x_ref.shape
    parts = pl.cdiv(T, ROWS_PER_PROGRAM)
    example, part = pl.program_id(0) // parts, pl.program_id(0) % parts

    def settle(place, sums, **terms):
        """Stores gradients per token and adds the others to the sums over rows, at once, to free registers."""
        for name, ref in d_token_refs.items():
            if name in terms:
                place.store(ref, terms[name])
        return {name: sum_ + jnp.sum(terms[name], axis=0) if name in terms else sum_ for name, sum_ in sums.items()}

    def step(i, sums):
        place = Place.of(example, part * ROWS_PER_PROGRAM + i * tile.rows, tile, T, D)
        scale, weight = place.load(scale_ref), place.load(weight_ref)
        rstd = place.statistic(rstd_ref)
        centred = place.load(x_ref)
        if mean_ref is not None:
            centred -= place.statistic(mean_ref)
        x_hat = centred * rstd
        d_y = place.load(d_y_ref)
        of_gain = d_y * x_hat
        gain = of_gain * _gain(scale, None) if "scale" in d_token_refs else of_gain
        sums = settle(place, sums, gain=gain, shift=d_y, scale=of_gain * _gain(None, weight))

        g = d_y * _gain(scale, weight)  # zero outside the mask, because d_y is; x_hat may be non-zero there
        of_x_hat, of_mean = jnp.sum(g * x_hat, axis=1, keepdims=True), 0.0
        if mean_ref is not None:
            of_mean = jnp.sum(g, axis=1, keepdims=True) / D
        d_x = (g - of_mean - x_hat * (of_x_hat / D)) * rstd
        if branch_ref is not None:
            d_x += place.load(d_x_new_ref)
        place.store(d_x_ref, d_x)
        if branch_ref is not None:
            sums = settle(place, sums, gate=d_x * place.load(branch_ref))
            place.store(d_branch_ref, d_x * place.load(gate_ref))
        return sums

    zeros = {name: jnp.zeros(tile.width, jnp.float32) for name in sum_refs}
    sums = jax.lax.fori_loop(0, pl.cdiv(min(T, ROWS_PER_PROGRAM), tile.rows), step, zeros)
    place = Place.of(example, part, tile, T, D)
    for name, ref in sum_refs.items():
        pltriton.store(ref.at[example, part, place.columns], sums[name], mask=place.column_mask)
