"""The list of row tiles of a grouped GEMM: the rows and the expert of each program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowTiles:
    """Tile i has the rows from start[i] up to stop[i], all of expert[i]; unused entries of the list are empty.

    Tiles of padding rows, if they are listed, have expert E.
    """

    expert: Any  # int32 (n,)
    start: Any
    stop: Any


def row_tiles(group_sizes, num_rows: int, block: int, *, rest: bool = False, align: int = 1) -> RowTiles:
    """A list of cdiv(R, block) + E - 1 tiles, the most that group sizes can need; `rest` adds one for padding rows.

    With `align` > 1 a tile ends within `block` rows of the multiple of `align` at or before its start, so that it can
    be loaded from there. That takes a few more tiles.
    """
    groups = group_sizes.astype(jnp.int32)
    if rest:
        groups = jnp.append(groups, jnp.maximum(num_rows - jnp.sum(groups), 0))
    count = pl.cdiv(num_rows + groups.size * (align - 1), block) + groups.size - 1
    ends = jnp.minimum(lax.cumsum(groups), num_rows)
    first = (ends - groups) // align * align
    of_group = jnp.where(groups > 0, pl.cdiv(ends - first, block), 0)
    tiles = lax.cumsum(of_group)
    number = jnp.arange(count, dtype=jnp.int32)
    expert = jnp.searchsorted(tiles, number, side="right", method="compare_all").astype(jnp.int32)
    exists, expert = expert < groups.size, jnp.minimum(expert, groups.size - 1)
    of = lambda values: values.at[expert].get(mode="promise_in_bounds")
    loaded = of(first) + (number - of(tiles - of_group)) * block
    start, stop = jnp.maximum(of(ends - groups), loaded), jnp.minimum(of(ends), loaded + block)
    return RowTiles(expert, jnp.where(exists, start, 0), jnp.where(exists, stop, 0))
