"""The MLPs in Pallas-Triton: kernels for the products with an epilogue; the other products are XLA's (cuBLAS).

Forward: one kernel multiplies x by gate and up, which share the tiles of x, and writes the pre-activations z (the only
residual beside the inputs) and the activation. Backward: one kernel computes d_out w_down^T and in its epilogue, from
z, the gradient of z and the activation again, which the gradient of w_down needs. The gradient of the activation is not
written to memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from .. import backend
from ..pallas.triton import dot, run
from ..pallas.triton_tiles import Columns, Rows, load_matrix, load_rows, store_rows, tile_of_program, walk
from . import cost
from .activations import value_and_derivative
from .blocks import blocks_for


DTYPES = ("bfloat16", "float16", "float32")


def unsupported(x, *arrays, activation) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del activation
    if x.dtype.name not in DTYPES or any(array.dtype != x.dtype for array in arrays):
        return f"needs all arrays in one dtype among {', '.join(DTYPES)}, got {[a.dtype.name for a in (x, *arrays)]}"
    return backend.why_not_triton()


def gated_forward(x, w_gate_up, w_down, *, activation):
    """The output, and (x, w_gate_up, w_down, z): z are the pre-activations, (R, 2 F)."""
    z, hidden = _up("gated_mlp", x, w_gate_up, None, activation)
    return product(hidden, w_down), (x, w_gate_up, w_down, z)


def gated_backward(residuals, d_out, *, activation):
    """d_x, d_w_gate_up and d_w_down."""
    x, w_gate_up, w_down, z = residuals
    d_z, hidden = _d_z("gated_mlp", d_out, w_down, z, activation)
    D, G, F = w_gate_up.shape
    d_x = product(d_z, w_gate_up.reshape(D, G * F), 1, 1)
    return d_x, product(x, d_z, 0, 0).reshape(D, G, F), product(hidden, d_out, 0, 0)


def dense_forward(x, w_up, b_up, w_down, b_down, *, activation):
    """The output, and (x, w_up, w_down, z): z are the pre-activations, (R, F)."""
    z, hidden = _up("dense_mlp", x, w_up[:, None], b_up, activation)
    out = product(hidden, w_down).astype(jnp.float32) + b_down.astype(jnp.float32)[None]
    return out.astype(x.dtype), (x, w_up, w_down, z)


def dense_backward(residuals, d_out, *, activation):
    """d_x, d_w_up, d_b_up, d_w_down and d_b_down."""
    x, w_up, w_down, z = residuals
    d_z, hidden = _d_z("dense_mlp", d_out, w_down, z, activation)
    total = lambda d: jnp.sum(d.astype(jnp.float32), axis=0).astype(d.dtype)
    return (product(d_z, w_up, 1, 1), product(x, d_z, 0, 0), total(d_z),
            product(hidden, d_out, 0, 0), total(d_out))  # fmt: skip


def product(a, b, of_a: int = 1, of_b: int = 0):
    """Contracts dim `of_a` of a with dim `of_b` of b; accumulates in float32, returns the dtype of a."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((), ())), precision=precision, preferred_element_type=a.dtype
    )


def _up(op: str, x, w, bias, activation):
    """z = x w + bias, (R, G F), and its activation, (R, F); w is (D, G, F), with G = 2 if gated, else 1."""
    (R, D), (_, G, F) = x.shape, w.shape
    blocks = blocks_for(op, "forward_up", x.dtype, D, F, R)
    out = [jax.ShapeDtypeStruct((R, G * F), x.dtype), jax.ShapeDtypeStruct((R, F), x.dtype)]
    return run(
        functools.partial(_up_kernel, activation=activation, blocks=blocks),
        *(x, w.reshape(D, G * F), bias),
        name=f"{op}_forward_up",
        programs=pl.cdiv(R, blocks.rows) * pl.cdiv(F, blocks.columns),
        blocks=blocks,
        out_shape=out,
        work=cost.part(2 * R * D * G * F, x, w, bias, out, transcendentals=R * F),
    )


def _d_z(op: str, d_out, w_down, z, activation):
    """The gradient of z, and the activation of z, recomputed."""
    (R, D), F = d_out.shape, w_down.shape[0]
    blocks = blocks_for(op, "backward_dz", z.dtype, D, F, R)
    out = [jax.ShapeDtypeStruct(z.shape, z.dtype), jax.ShapeDtypeStruct((R, F), z.dtype)]
    return run(
        functools.partial(_d_z_kernel, activation=activation, blocks=blocks),
        *(d_out, w_down, z),
        name=f"{op}_backward_dz",
        programs=pl.cdiv(R, blocks.rows) * pl.cdiv(F, blocks.columns),
        blocks=blocks,
        out_shape=out,
        work=cost.part(2 * R * D * F, d_out, w_down, z, out, transcendentals=R * F),
    )


def _place(R: int, F: int, blocks):
    """This program's rows and columns."""
    tile, column = tile_of_program(pl.program_id(0), pl.cdiv(R, blocks.rows), pl.cdiv(F, blocks.columns))
    rows = Rows(tile * blocks.rows, jnp.int32(R), blocks.rows)
    return rows, Columns(column * blocks.columns, blocks.columns, F)


def _up_kernel(x_ref, w_ref, bias_ref, z_ref, hidden_ref, *, activation, blocks):
    R, F = hidden_ref.shape
    rows, columns = _place(R, F, blocks)
    parts = [columns] if bias_ref is not None else [columns, columns.after(F)]

    def step(depth, accs):
        x = load_rows(x_ref, rows, depth)
        return tuple(acc + dot(x, load_matrix(w_ref, depth, part)) for acc, part in zip(accs, parts, strict=True))

    zeros = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
    accs = walk(x_ref.shape[1], blocks.depth, rows.start < rows.stop, step, (zeros,) * len(parts))
    if bias_ref is not None:
        bias = pltriton.load(bias_ref.at[columns.at], mask=columns.exist, other=None if columns.exist is None else 0.0)
        accs = [accs[0] + bias.astype(jnp.float32)[None, :]]
    accs = [acc.astype(z_ref.dtype) for acc in accs]  # rounded, as for the backward
    for acc, part in zip(accs, parts, strict=True):
        store_rows(z_ref, rows, part, acc)
    hidden, _ = value_and_derivative(accs[0].astype(jnp.float32), activation)
    store_rows(hidden_ref, rows, columns, hidden if bias_ref is not None else hidden * accs[1].astype(jnp.float32))


def _d_z_kernel(d_out_ref, w_ref, z_ref, d_z_ref, hidden_ref, *, activation, blocks):
    R, F = hidden_ref.shape
    rows, columns = _place(R, F, blocks)
    halves = columns.halves()  # the epilogue runs on one half after the other, so that it fits in registers

    def step(depth, accs):
        d_out = load_rows(d_out_ref, rows, depth)
        return tuple(acc + dot(d_out, load_matrix(w_ref, half, depth), trans_b=True)
                     for acc, half in zip(accs, halves, strict=True))  # fmt: skip

    zeros = jnp.zeros((blocks.rows, halves[0].size), jnp.float32)
    products = walk(d_out_ref.shape[1], blocks.depth, rows.start < rows.stop, step, (zeros, zeros))
    for d_hidden, half in zip(products, halves, strict=True):
        value, derivative = value_and_derivative(load_rows(z_ref, rows, half).astype(jnp.float32), activation)
        if z_ref.shape[1] > F:
            up = load_rows(z_ref, rows, half.after(F)).astype(jnp.float32)
            store_rows(d_z_ref, rows, half.after(F), d_hidden * value)
            value, derivative = value * up, derivative * up
        store_rows(hidden_ref, rows, half, value)
        store_rows(d_z_ref, rows, half, d_hidden * derivative)
