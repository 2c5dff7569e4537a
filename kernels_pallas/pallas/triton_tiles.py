"""What a program that multiplies matrices holds: some rows, which may lie anywhere, and columns beside each other.

Loads are zero past the edges of the matrix, stores end there. Rows may be loaded by their numbers, where an index
says which they are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton


SUPER_ROWS = 8  # row tiles whose programs run side by side, and so share columns in the cache


def tile_of_program(program, row_tiles: int, column_tiles: int):
    """(row tile, column tile): down SUPER_ROWS row tiles, then the next column."""
    span = SUPER_ROWS * column_tiles
    first = lax.div(program, span) * SUPER_ROWS
    down = jnp.minimum(row_tiles - first, SUPER_ROWS)
    rest = lax.rem(program, span)
    return first + lax.rem(rest, down), lax.div(rest, down)


@dataclasses.dataclass(frozen=True)
class Columns:
    """`size` columns from `start`, which may reach past the last of `limit`; `before` lie before them in the array.

    `start` is a multiple of `size`, or part of such a tile of `whole` columns.
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
        """bool (size,), or None where all are sure to."""
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
        """The same columns of the next block of an array that holds several side by side."""
        return dataclasses.replace(self, before=before)


@dataclasses.dataclass(frozen=True)
class Rows:
    """`size` rows from `start`, of which those before `stop` are meant."""

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
        """The rows of another array that are to be read: index[row], or the rows themselves. None is past its edge."""
        number = jnp.minimum(self.number, num_rows - 1)
        return number if index_ref is None else index_ref[number]

    def load(self, ref):
        """A number for each row of a vector; zero for those not meant."""
        return pltriton.load(ref.at[pl.ds(self.start, self.size)], mask=self.exist, other=jnp.zeros((), ref.dtype))


def load_matrix(ref, down: Columns, across: Columns, *index) -> jax.Array:
    """ref[*index, down, across]."""
    return _load(ref.at[(*index, down.at, across.at)], down.exist, across.exist, (down.size, across.size))


def store_matrix(ref, down: Columns, across: Columns, values, *index) -> None:
    """ref[*index, down, across] = values, in its dtype."""
    mask = _mask(down.exist, across.exist, (down.size, across.size))
    pltriton.store(ref.at[(*index, down.at, across.at)], values.astype(ref.dtype), mask=mask)


def load_places(ref, places, columns: Columns, *, exist=None) -> jax.Array:
    """ref[places, columns]; zero for rows that do not exist."""
    # Not a slice of columns: interpret mode knows no mixture of slices and vectors.
    at = ref.at[places[:, None], columns.number[None, :]]
    return _load(at, exist, columns.exist, (places.size, columns.size))


def load_rows(ref, rows: Rows, columns: Columns) -> jax.Array:
    """ref[rows, columns]; zero for those not meant."""
    at = ref.at[pl.ds(rows.start, rows.size), columns.at]
    return _load(at, rows.exist, columns.exist, (rows.size, columns.size))


def store_rows(ref, rows: Rows, columns: Columns, values) -> None:
    """ref[rows, columns] = values, in its dtype."""
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
    """step(columns, carry) over blocks of a contraction of `depth`; not at all where not `enabled`.

    The count is never a constant: a short loop that has one is unrolled, and spills.
    """
    steps = jnp.where(enabled, jnp.int32(pl.cdiv(depth, block)), jnp.int32(0))
    return lax.fori_loop(jnp.int32(0), steps, lambda i, carry: step(Columns(i * block, block, depth), carry), carry)
