"""Where a program of the experts' Triton kernels stands: whose rows it has, and which columns."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..pallas.triton_tiles import Columns, Rows, tile_of_program


def place(tiles, num_experts: int, width: int, blocks):
    """This program's (expert, rows, columns) among the tiles of `width` columns, and whether an expert has the rows."""
    column_tiles = pl.cdiv(width, blocks.columns)
    tile, column = tile_of_program(pl.program_id(0), tiles.start.size, column_tiles)
    rows = Rows(tiles.start[tile], tiles.stop[tile], blocks.rows)
    expert = tiles.expert[tile]
    enabled = (rows.start < rows.stop) & (expert < num_experts)
    columns = Columns(column * blocks.columns, blocks.columns, width)
    return jnp.minimum(expert, num_experts - 1), rows, columns, enabled
