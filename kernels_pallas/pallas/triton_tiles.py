"""Masked tile loads and stores for Triton matrix kernels: contiguous columns, and contiguous or gathered rows.

Loads return zero outside the matrix; stores write nothing there. Gathered rows are loaded by an index of row numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton


SUPER_ROWS = 8  # row tiles per group of consecutive programs, which share columns in the L2 cache (grid swizzling)


def tile_of_program(program, row_tiles: int, column_tiles: int):
    """(row tile, column tile) of a program: SUPER_ROWS row tiles of one column tile, then the next column tile."""
    span = SUPER_ROWS * column_tiles
    first = lax.div(program, span) * SUPER_ROWS
    down = jnp.minimum(row_tiles - first, SUPER_ROWS)
    rest = lax.rem(program, span)
    return first + lax.rem(rest, down), lax.div(rest, down)


@dataclasses.dataclass(frozen=True)
class Columns:
    """A tile of `size` columns from `start`, of a block of `limit` columns; it may extend past the end of the block.

    The block begins at column `before` of the array. `start` is a multiple of `size`, or the tile is a part of a tile
    of `whole` columns that starts at a multiple of `whole`.
    """

    start: Any
    size: int
    limit: int
    before: int = 0
    whole: int = 0

    @property
    def number(self):
        return self.start + jnp.arange(self.size, dtype=jnp.int32)

    @property
    def exist(self):
        """Which columns exist, bool (size,); None if all do in every tile."""
        return None if self.limit % (self.whole or self.size) == 0 else self.number < self.limit

    @property
    def at(self):
        return pl.ds(self.start + jnp.int32(self.before), self.size)

    def halves(self) -> tuple["Columns", "Columns"]:
        size = self.size // 2
        return self._part(0, size), self._part(size, size)

    def _part(self, first: int, size: int) -> "Columns":
        return dataclasses.replace(self, start=self.start + first, size=size, whole=self.size)

    def after(self, before: int) -> "Columns":
        """The same columns of another block, which begins at column `before` of the array."""
        return dataclasses.replace(self, before=before)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A tile of `size` rows from `start`; the rows from `stop` on are masked."""

    start: Any
    stop: Any
    size: int

    @property
    def number(self):
        return self.start + jnp.arange(self.size, dtype=jnp.int32)

    @property
    def exist(self):
        return self.number < self.stop

    def places(self, index_ref, num_rows: int):
        """The row numbers to load: index[row], or the rows themselves without an index, clipped to num_rows - 1."""
        number = jnp.minimum(self.number, num_rows - 1)
        return number if index_ref is None else index_ref[number]

    def load(self, ref):
        """The elements of a vector at these rows; zero for masked rows."""
        return pltriton.load(ref.at[pl.ds(self.start, self.size)], mask=self.exist, other=jnp.zeros((), ref.dtype))


def load_matrix(ref, down: Columns, across: Columns, *index) -> jax.Array:
    """ref[*index, down, across]."""
    return _load(ref.at[(*index, down.at, across.at)], down.exist, across.exist, (down.size, across.size))


def store_matrix(ref, down: Columns, across: Columns, values, *index) -> None:
    """ref[*index, down, across] = values, cast to the dtype of ref."""
    mask = _mask(down.exist, across.exist, (down.size, across.size))
    pltriton.store(ref.at[(*index, down.at, across.at)], values.astype(ref.dtype), mask=mask)


def load_places(ref, places, columns: Columns, *, exist=None) -> jax.Array:
    """ref[places, columns]; zero for rows that do not exist."""
    # The columns are a vector and not a slice: interpret mode does not support mixing slices and vectors.
    at = ref.at[places[:, None], columns.number[None, :]]
    return _load(at, exist, columns.exist, (places.size, columns.size))


def load_rows(ref, rows: Rows, columns: Columns) -> jax.Array:
    """ref[rows, columns]; zero for masked rows."""
    at = ref.at[pl.ds(rows.start, rows.size), columns.at]
    return _load(at, rows.exist, columns.exist, (rows.size, columns.size))


def store_rows(ref, rows: Rows, columns: Columns, values) -> None:
    """ref[rows, columns] = values, cast to the dtype of ref."""
    at = ref.at[pl.ds(rows.start, rows.size), columns.at]
    mask = _mask(rows.exist, columns.exist, (rows.size, columns.size))
    pltriton.store(at, values.astype(ref.dtype), mask=mask)


def _load(at, down, across, shape) -> jax.Array:
    mask = _mask(down, across, shape)
    return pltriton.load(at, mask=mask, other=None if mask is None else 0.0)


def _mask(down, across, shape):
    exist = True
    if down is not None:
        exist &= down[:, None]
    if across is not None:
        exist &= across[None, :]
    return None if exist is True else jnp.broadcast_to(exist, shape)


def walk(depth: int, block: int, enabled, step: Callable, carry):
    """Runs step(columns, carry) over the blocks of a contraction of size `depth`; no step if `enabled` is false.

    The trip count is never a constant: a short loop with a constant count would be unrolled and would spill registers.
    """
    steps = jnp.where(enabled, jnp.int32(pl.cdiv(depth, block)), jnp.int32(0))
    return lax.fori_loop(jnp.int32(0), steps, lambda i, carry: step(Columns(i * block, block, depth), carry), carry)
