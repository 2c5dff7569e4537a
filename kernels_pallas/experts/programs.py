"""The output tile of a program of the Triton MoE kernels: its expert, rows and columns."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..pallas.triton_tiles import Columns, Rows, tile_of_program


def place(tiles, num_experts: int, width: int, blocks):
    """(expert, rows, columns, enabled) of this program; `enabled` is false if its rows are padding."""
    column_tiles = pl.cdiv(width, blocks.columns)
    tile, column = tile_of_program(pl.program_id(0), tiles.start.size, column_tiles)
    rows = Rows(tiles.start[tile], tiles.stop[tile], blocks.rows)
    expert = tiles.expert[tile]
    enabled = (rows.start < rows.stop) & (expert < num_experts)
    columns = Columns(column * blocks.columns, blocks.columns, width)
    return jnp.minimum(expert, num_experts - 1), rows, columns, enabled
