"""MoE dispatch and combine in Pallas-Triton: gathering tokens into rows, and summing the rows of each token.

Each is the backward of the other. A program of `sum_rows` has a tile of tokens and columns and adds each token's rows
in the order of experts. It is a gather: no two programs write the same element, and the order of the sum is fixed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from .. import backend
from ..pallas.triton import run
from ..pallas.triton_tiles import Columns, Rows, load_places, load_rows, store_rows
from . import cost
from .routing import Routing, starts


DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile of a program: 16 bytes of bfloat16 per thread and row."""

    rows: int
    columns: int
    num_warps: int = 4
    num_stages: int = 3


def tile_for(width: int) -> Tile:
    """The tile for rows of `width` columns: up to 512 columns, and as many rows as give 16 numbers per thread."""
    columns = min(pl.next_power_of_2(width), 512)
    return Tile(max(16 * 128 // columns, 1), columns)


def unsupported(x, routing) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del routing
    if x.dtype.name not in DTYPES:
        return f"needs a dtype among {', '.join(DTYPES)}, got {x.dtype}"
    return backend.why_not_triton()


def dispatch_forward(x, routing):
    """The rows, and the routing as residual."""
    return copy_rows(x, routing, name="dispatch_forward"), routing


def dispatch_backward(routing, d_rows):
    """d_x."""
    return sum_rows(d_rows, routing, name="dispatch_backward", weighted=False), None


def combine_forward(y, routing):
    """The sums, and the arguments as residuals."""
    return sum_rows(y, routing, name="combine_forward", weighted=True), (y, routing)


def combine_backward(residuals, d_out):
    """d_y, and the cotangent of the routing (the gradient of its weights)."""
    y, routing = residuals
    d_y, d_weight = copy_rows(d_out, routing, name="combine_backward", y=y)
    return d_y, Routing.cotangent(d_weight)


def copy_rows(x, routing, *, name: str, y=None):
    """x[row_index]; with y, row_weight x[row_index] and <y, x[row_index]> for each row. Padding rows are zero."""
    (R,), D = routing.row_index.shape, x.shape[1]
    tile = tile_for(D)
    out = [jax.ShapeDtypeStruct((R, D), x.dtype)]
    if y is not None:
        out.append(jax.ShapeDtypeStruct((R,), jnp.float32))
    done = run(
        functools.partial(_copy_rows_kernel, tile=tile),
        *(x, routing.row_index, jnp.sum(routing.group_sizes)[None], None if y is None else routing.row_weight, y),
        name=name,
        programs=pl.cdiv(R, tile.rows),
        blocks=tile,
        out_shape=out,
        work=cost.part(0 if y is None else 3 * R * D, x, out, y),
    )
    return done[0] if y is None else done


def sum_rows(y, routing, *, name: str, weighted: bool):
    """The sum of each token's rows of y, weighted by row_weight or not, in float32; (T, D) in the dtype of y."""
    D, (T,) = y.shape[1], routing.token_sizes.shape
    tile = tile_for(D)
    out = jax.ShapeDtypeStruct((T, D), y.dtype)
    weight = routing.row_weight if weighted else None
    return run(
        functools.partial(_sum_rows_kernel, tile=tile),
        *(y, routing.inverse, weight, starts(routing.token_sizes), routing.token_sizes),
        name=name,
        programs=pl.cdiv(T, tile.rows) * pl.cdiv(D, tile.columns),
        blocks=tile,
        out_shape=out,
        work=cost.part(2 * y.size, y, out),
    )


def _copy_rows_kernel(x_ref, index_ref, total_ref, weight_ref, y_ref, out_ref, d_weight_ref=None, *, tile):
    D = x_ref.shape[1]
    start = pl.program_id(0) * tile.rows
    rows = Rows(start, index_ref.shape[0], tile.rows)
    meant = Rows(start, jnp.minimum(total_ref[0], index_ref.shape[0]), tile.rows)
    places = rows.places(index_ref, index_ref.shape[0])
    weight = None if weight_ref is None else meant.load(weight_ref)[:, None]

    def step(i, total):
        columns = Columns(i * tile.columns, tile.columns, D)
        x = load_places(x_ref, places, columns, exist=meant.exist)
        if weight is not None:
            x32 = x.astype(jnp.float32)
            total += jnp.sum(x32 * load_rows(y_ref, meant, columns).astype(jnp.float32), axis=1)
            x = x32 * weight
        store_rows(out_ref, rows, columns, x)
        return total

    total = lax.fori_loop(0, pl.cdiv(D, tile.columns), step, jnp.zeros((tile.rows,), jnp.float32))
    if d_weight_ref is not None:
        pltriton.store(d_weight_ref.at[pl.ds(start, tile.rows)], total, mask=rows.exist)


def _sum_rows_kernel(y_ref, inverse_ref, weight_ref, starts_ref, sizes_ref, out_ref, *, tile):
    T, D = out_ref.shape
    column_tiles = pl.cdiv(D, tile.columns)
    columns = Columns(lax.rem(pl.program_id(0), column_tiles) * tile.columns, tile.columns, D)
    tokens = Rows(lax.div(pl.program_id(0), column_tiles) * tile.rows, T, tile.rows)
    first, sizes = tokens.load(starts_ref), tokens.load(sizes_ref)

    def step(i, total):
        exist = i < sizes
        row = inverse_ref[jnp.where(exist, first + i, 0)]
        y = load_places(y_ref, row, columns, exist=exist).astype(jnp.float32)
        if weight_ref is None:
            return total + y
        return total + y * jnp.where(exist, weight_ref[row], 0.0)[:, None]  # another token's weight may be NaN

    zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    store_rows(out_ref, tokens, columns, lax.fori_loop(0, jnp.max(sizes), step, zeros))
