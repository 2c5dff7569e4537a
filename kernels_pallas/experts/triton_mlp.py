"""The MoE MLP in Pallas-Triton: kernels gather tokens directly and compute activations in their epilogues.

Forward: one kernel gathers tokens, multiplies by gate and up, and writes the pre-activations z, which are kept for the
backward, and the activation; then the down product and the weighted sum. Backward, in the order of SonicMoE: one kernel
computes d_out w_down^T and in its epilogue, from z, the gradient of z, the activation times the row's weight, and the
gradient of the row's weight; then the gradients of both matrices, which gather d_out and x; then the gradient of the
rows, and its sum over the rows of each token. Neither the activations nor the experts' outputs are kept.

Source: SonicMoE, https://arxiv.org/abs/2512.14080, section 3 and algorithms 2 to 5.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..pallas.triton import dot, run
from ..pallas.triton_tiles import load_matrix, load_places, load_rows, store_rows, walk
from . import cost, triton
from .blocks import NAMES, blocks_for
from .programs import place
from .routing import Routing
from .tiles import row_tiles
from .triton_rows import sum_rows


def unsupported(x, routing, w_gate_up, w_down) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    return triton.unsupported(x, w_down, routing.group_sizes) if w_gate_up is not None else None


def forward(x, routing, w_gate_up, w_down):
    """The output, and (x, routing, w_gate_up, w_down, z): z are the pre-activations, (R, 2 F)."""
    z, a = _up(x, routing, w_gate_up)
    y = triton.product(a, w_down, routing.group_sizes, kernel="down")
    out = sum_rows(y, routing, name="expert_mlp_forward_sum", weighted=True)
    return out, (x, routing, w_gate_up, w_down, z)


def backward(residuals, d_out):
    """d_x, the cotangent of the routing (the gradient of its weights), d_w_gate_up and d_w_down."""
    x, routing, w_gate_up, w_down, z = residuals
    sizes, index = routing.group_sizes, routing.row_index
    d_z, a, d_weight = _d_z(d_out, routing, w_down, z)
    d_w_down = triton.weight_gradient(a, d_out, sizes, kernel="dw_down", d_y_index=index)
    d_w_gate_up = triton.weight_gradient(x, d_z, sizes, kernel="dw_up", x_index=index)
    d_rows = triton.product(d_z, w_gate_up, sizes, kernel="drows", transposed=True)
    d_x = sum_rows(d_rows, routing, name="expert_mlp_backward_sum", weighted=False)
    return d_x, Routing.cotangent(d_weight), d_w_gate_up, d_w_down


def _up(x, routing, w_gate_up):
    """z = x[row_index] w_gate_up, and a = silu(gate) * up."""
    E, D, F2 = w_gate_up.shape
    (R,), F = routing.row_index.shape, F2 // 2
    blocks = blocks_for("up", x.dtype, D, F, R // E)
    tiles = row_tiles(routing.group_sizes, R, blocks.rows)
    out = [jax.ShapeDtypeStruct((R, F2), x.dtype), jax.ShapeDtypeStruct((R, F), x.dtype)]
    return run(
        functools.partial(_up_kernel, blocks=blocks),
        *(x, routing.row_index, w_gate_up, tiles),
        name=NAMES["up"],
        programs=tiles.start.size * pl.cdiv(F, blocks.columns),
        blocks=blocks,
        out_shape=out,
        work=cost.part(2 * R * D * F2, x, w_gate_up, out, transcendentals=R * F),
    )


def _d_z(d_out, routing, w_down, z):
    """The gradient of z, the activation times the row's weight, and the gradient of the row weights."""
    E, F, D = w_down.shape
    R = z.shape[0]
    blocks = blocks_for("dz", z.dtype, D, F, R // E)
    tiles = row_tiles(routing.group_sizes, R, blocks.rows)
    column_tiles = pl.cdiv(F, blocks.columns)
    part = jax.ShapeDtypeStruct((column_tiles, R), jnp.float32)
    out = [jax.ShapeDtypeStruct(z.shape, z.dtype), jax.ShapeDtypeStruct((R, F), z.dtype), part]
    d_z, a, parts = run(
        functools.partial(_d_z_kernel, blocks=blocks),
        *(d_out, routing.row_index, routing.row_weight, w_down, z, tiles),
        name=NAMES["dz"],
        programs=tiles.start.size * column_tiles,
        blocks=blocks,
        out_shape=out,
        work=cost.part(2 * R * D * F, d_out, w_down, z, out, transcendentals=R * F),
    )
    exists = jnp.arange(R, dtype=jnp.int32) < jnp.sum(routing.group_sizes)
    return d_z, a, jnp.where(exists, parts.sum(axis=0), 0.0)


def _up_kernel(x_ref, index_ref, w_ref, tiles, z_ref, a_ref, *, blocks):
    F = a_ref.shape[1]
    expert, rows, columns, enabled = place(tiles, w_ref.shape[0], F, blocks)
    places = rows.places(index_ref, index_ref.shape[0])

    def step(depth, carry):
        gate, up = carry
        x = load_places(x_ref, places, depth)
        gate += dot(x, load_matrix(w_ref, depth, columns, expert))
        return gate, up + dot(x, load_matrix(w_ref, depth, columns.after(F), expert))

    zeros = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
    gate, up = walk(x_ref.shape[1], blocks.depth, enabled, step, (zeros, zeros))
    gate, up = gate.astype(z_ref.dtype), up.astype(z_ref.dtype)  # rounded as the backward reads them
    store_rows(z_ref, rows, columns, gate)
    store_rows(z_ref, rows, columns.after(F), up)
    gate32 = gate.astype(jnp.float32)
    store_rows(a_ref, rows, columns, gate32 * jax.nn.sigmoid(gate32) * up.astype(jnp.float32))


def _d_z_kernel(d_out_ref, index_ref, weight_ref, w_ref, z_ref, tiles, d_z_ref, a_ref, d_weight_ref, *, blocks):
    F = a_ref.shape[1]
    expert, rows, columns, enabled = place(tiles, w_ref.shape[0], F, blocks)
    places = rows.places(index_ref, index_ref.shape[0])

    halves = columns.halves()  # the epilogue runs on one half after the other, so that it fits in registers

    def step(depth, accs):
        d_out = load_places(d_out_ref, places, depth)
        matrices = [load_matrix(w_ref, half, depth, expert) for half in halves]
        return tuple(acc + dot(d_out, w, trans_b=True) for acc, w in zip(accs, matrices, strict=True))

    zeros = jnp.zeros((blocks.rows, halves[0].size), jnp.float32)
    products = walk(d_out_ref.shape[1], blocks.depth, enabled, step, (zeros, zeros))
    weight = rows.load(weight_ref)
    d_weight = jnp.zeros((blocks.rows,), jnp.float32)
    for d_a, half in zip(products, halves, strict=True):  # d_a: before the multiplication by the row's weight
        gate = load_rows(z_ref, rows, half).astype(jnp.float32)
        up = load_rows(z_ref, rows, half.after(F)).astype(jnp.float32)
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        store_rows(d_z_ref, rows, half.after(F), weight[:, None] * d_a * silu)
        store_rows(a_ref, rows, half, weight[:, None] * silu * up)
        d_silu = d_a * up
        d_weight += jnp.sum(d_silu * silu, axis=1)
        store_rows(d_z_ref, rows, half, weight[:, None] * d_silu * (sigmoid + silu * (1.0 - sigmoid)))
    tile = jax.lax.div(columns.start, jnp.int32(blocks.columns))
    pltriton.store(d_weight_ref.at[tile, pl.ds(rows.start, rows.size)], d_weight, mask=rows.exist)
