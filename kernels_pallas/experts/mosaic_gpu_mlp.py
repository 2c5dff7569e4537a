"""Forward of the MoE MLP for Hopper in Pallas-Mosaic-GPU: gate, up and activation in one kernel, then down.

TMA cannot gather rows on Hopper, so XLA gathers the tokens first, into a temporary copy. The residuals are those of the
Triton implementation, whose backward is used.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..pallas.mosaic_gpu import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    DEPTH,
    ROWS,
    Stream,
    fill,
    free,
    multiply,
    operand,
    ready,
    round_up,
    run_kernel,
)
from . import mosaic_gpu
from .blocks import NAMES
from .mosaic_gpu import ALIGN, Tile, blocks_for, whole_rows
from .tiles import row_tiles
from .triton_rows import sum_rows


def unsupported(x, routing, w_gate_up, w_down) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del w_gate_up
    return mosaic_gpu.unsupported(x, w_down, routing.group_sizes)


def forward(x, routing, w_gate_up, w_down):
    """The output, and (x, routing, w_gate_up, w_down, z), the residuals of the Triton backward."""
    z, a = _up(x[routing.row_index], w_gate_up, routing.group_sizes)
    y = mosaic_gpu.product(a, w_down, routing.group_sizes, kernel="down")
    out = sum_rows(y, routing, name="expert_mlp_forward_sum", weighted=True)
    return out, (x, routing, w_gate_up, w_down, z)


def _up(rows, w_gate_up, group_sizes):
    """z = rows w_gate_up, and a = silu(gate) * up."""
    (R, D), (E, _, F2) = rows.shape, w_gate_up.shape
    F = F2 // 2
    blocks = blocks_for("up", rows.dtype, D, F, R // E)
    tiles = row_tiles(group_sizes, R, CONSUMERS * ROWS, align=ALIGN)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, rows.dtype)
    matrix = operand(blocks.stages, DEPTH, of(blocks.columns))
    z, a = run_kernel(
        functools.partial(_up_kernel, blocks=blocks),
        *(whole_rows(rows), w_gate_up, tiles),
        name=NAMES["up"],
        programs=tiles.start.size * pl.cdiv(F, blocks.columns),
        # z is (R, 2, F) and not (R, 2 F), so that the last column tile of gate cannot overlap up.
        out_type=[of(round_up(R, ALIGN), 2, F), of(round_up(R, ALIGN), F)],
        scratch=[
            *(operand(blocks.stages, CONSUMERS * ROWS, of(DEPTH)), matrix, matrix),
            plgpu.SMEM((CONSUMERS, ROWS, blocks.columns), rows.dtype),
            *(ready(blocks, copies=3), free(blocks)),
        ],
    )
    return z.reshape(-1, F2)[:R], a[:R]


def _up_kernel(
    x_ref, w_ref, tiles, z_ref, a_ref, x_smem, gate_smem, up_smem, out_smem, ready, free, *, blocks
):  # fmt: skip
    F = a_ref.shape[1]
    tile = Tile.of_program(tiles, w_ref.shape[0], F, x_ref.shape[1], blocks)
    of_gate, of_up = pl.ds(tile.column, blocks.columns), pl.ds(tile.column + F, blocks.columns)
    me = lax.axis_index("warpgroup")

    @pl.when(me == CONSUMERS)
    def _produce():
        matrix = lambda columns: lambda i: w_ref.at[tile.expert, pl.ds(i * DEPTH, DEPTH), columns]
        copies = [(lambda i: x_ref.at[tile.rows(i)], x_smem), (matrix(of_gate), gate_smem), (matrix(of_up), up_smem)]
        fill(tile, blocks, Stream(ready, free, copies))

    @pl.when(me < CONSUMERS)
    def _consumer_kernel():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

        def products(gate, up):
            slots = [lambda slot: gate_smem.at[slot], lambda slot: up_smem.at[slot]]
            multiply(tile, x_smem, slots, ready, free, me, [gate, up], blocks)
            return gate[...], up[...]

        acc = plgpu.WGMMAAccumulatorRef((ROWS, blocks.columns), jnp.float32)
        gate, up = (x.astype(z_ref.dtype) for x in pl.run_scoped(products, acc, acc))  # rounded, as for the backward

        def store(out_ref, values, *where):
            out_smem.at[me][...] = values
            plgpu.commit_smem()
            tile.store(out_ref, out_smem, me, *where)
            plgpu.wait_smem_to_gmem(0)

        store(z_ref, gate, 0, of_gate)
        store(z_ref, up, 1, of_gate)
        gate32 = gate.astype(jnp.float32)
        a = gate32 / (1.0 + jnp.exp(-gate32)) * up.astype(jnp.float32)
        store(a_ref, a.astype(a_ref.dtype), of_gate)
