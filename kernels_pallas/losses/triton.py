"""Fused linear cross-entropy in Pallas-Triton: a program keeps its tile of the logits in registers.

Forward: each program computes one tile of the logits and writes, for each row, the maximum and the sum of exponentials
in its tile; the tile with the row's label also writes the label's logit. XLA merges the partial results of a row. The
backward loops over chunks of the vocabulary: a kernel recomputes the logits of a chunk and writes their gradients in
the dtype of x; two XLA products (cuBLAS) compute d_w of the chunk and add its part of d_x in float32. A chunk has CHUNK
columns for any V, so memory is proportional to R x CHUNK and not to R x V. There are no atomics.

Source: in one kernel with atomics, Cut Cross-Entropy, arXiv 2411.09009, algorithms 2 and 3; by chunks of
rows, Liger, arXiv 2410.10989, section 3.2.
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
from .blocks import BACKWARD, FORWARD, blocks_for


DTYPES = ("bfloat16", "float16", "float32")
CHUNK = 4096  # columns of the vocabulary: with 8,192 rows of bfloat16 64 MiB, and products large enough for cuBLAS


def unsupported(x, w, labels, *, ignore_index, z_loss, logit_softcap) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del labels, ignore_index, z_loss, logit_softcap
    if x.dtype.name not in DTYPES or w.dtype != x.dtype:
        return f"needs x and w in one dtype among {', '.join(DTYPES)}, got {x.dtype} and {w.dtype}"
    return backend.why_not_triton()


def forward(x, w, labels, *, ignore_index, z_loss, logit_softcap):
    """((loss, lse), residuals): the inputs and lse."""
    (R, D), V = x.shape, w.shape[1]
    blocks = blocks_for(FORWARD, x.dtype, D, V, R, logit_softcap is not None)
    parts = jax.ShapeDtypeStruct((pl.cdiv(V, blocks.columns), R), jnp.float32)
    row = jax.ShapeDtypeStruct((R,), jnp.float32)
    largest, total, of_label = run(
        functools.partial(_forward_kernel, softcap=logit_softcap, blocks=blocks),
        *(x, w, labels),
        name=FORWARD,
        programs=pl.cdiv(R, blocks.rows) * parts.shape[0],
        blocks=blocks,
        out_shape=[parts, parts, row],
        work=cost.part(2 * R * D * V, x, w, labels, parts, parts, row, transcendentals=R * V),
    )
    peak = largest.max(axis=0)
    lse = peak + jnp.log(jnp.sum(total * jnp.exp(largest - peak[None]), axis=0))
    counts = labels != ignore_index
    loss = jnp.where(counts, lse - of_label + z_loss * jnp.square(lse), 0.0)
    return (loss, lse), (x, w, labels, lse)


def backward(residuals, d_out, *, ignore_index, z_loss, logit_softcap):
    """d_x, d_w, and None for the labels."""
    x, w, labels, lse = residuals
    d_loss = jnp.where(labels != ignore_index, d_out[0], 0.0)
    d_lse = d_loss * (1 + 2 * z_loss * lse) + d_out[1]  # the gradient through lse, from the loss and from the output
    (R, D), V = x.shape, w.shape[1]

    def add(first, size: int, d_x, d_w):
        """Adds the contribution of `size` columns from `first` on."""
        part = jax.lax.dynamic_slice_in_dim(w, first, size, axis=1)
        d_logits = _d_logits(x, part, labels - first, lse, d_loss, d_lse, logit_softcap)
        d_x = d_x + _product(d_logits, part, 1, 1, jnp.float32)
        return d_x, jax.lax.dynamic_update_slice_in_dim(d_w, _product(x, d_logits, 0, 0, w.dtype), first, axis=1)

    chunk, sums = min(CHUNK, V), (jnp.zeros((R, D), jnp.float32), jnp.zeros_like(w))
    d_x, d_w = jax.lax.fori_loop(0, V // chunk, lambda i, sums: add(i * chunk, chunk, *sums), sums)
    if rest := V % chunk:
        d_x, d_w = add(V - rest, rest, d_x, d_w)
    return d_x.astype(x.dtype), d_w, None


def _d_logits(x, w, labels, lse, d_loss, d_lse, softcap):
    """The gradient of the logits x w before their cap, in the dtype of x; labels count from the first column of w."""
    (R, D), V = x.shape, w.shape[1]
    blocks = blocks_for(BACKWARD, x.dtype, D, V, R, softcap is not None)
    out = jax.ShapeDtypeStruct((R, V), x.dtype)
    return run(
        functools.partial(_d_logits_kernel, softcap=softcap, blocks=blocks),
        *(x, w, labels, lse, d_loss, d_lse),
        name=BACKWARD,
        programs=pl.cdiv(R, blocks.rows) * pl.cdiv(V, blocks.columns),
        blocks=blocks,
        out_shape=out,
        work=cost.part(2 * R * D * V, x, w, out, transcendentals=R * V),
    )


def _product(a, b, of_a: int, of_b: int, dtype):
    """Contracts dim `of_a` of a with dim `of_b` of b; accumulates in float32, returns `dtype`."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), precision=precision, preferred_element_type=dtype)


def _logits(x_ref, w_ref, blocks):
    """(rows, tile of the vocabulary, columns, logits before any cap, in float32) of this program."""
    (R, D), V = x_ref.shape, w_ref.shape[1]
    row_tile, tile = tile_of_program(pl.program_id(0), pl.cdiv(R, blocks.rows), pl.cdiv(V, blocks.columns))
    rows = Rows(row_tile * blocks.rows, jnp.int32(R), blocks.rows)
    columns = Columns(tile * blocks.columns, blocks.columns, V)

    def step(depth, acc):
        return acc + dot(load_rows(x_ref, rows, depth), load_matrix(w_ref, depth, columns))

    zeros = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
    return rows, tile, columns, walk(D, blocks.depth, rows.start < rows.stop, step, zeros)


def _capped(logits, softcap):
    """softcap * tanh(logits / softcap), with tanh computed from a sigmoid; the logits themselves if softcap is None."""
    if softcap is None:
        return logits
    return softcap * (2.0 * jax.nn.sigmoid(2.0 / softcap * logits) - 1.0)


def _forward_kernel(x_ref, w_ref, label_ref, largest_ref, total_ref, of_label_ref, *, softcap, blocks):
    rows, tile, columns, logits = _logits(x_ref, w_ref, blocks)
    logits = _capped(logits, softcap)
    is_label = rows.load(label_ref)[:, None] == columns.number[None, :]
    of_label = jnp.sum(jnp.where(is_label, logits, 0.0), axis=1)
    if columns.exist is not None:
        logits = jnp.where(columns.exist[None, :], logits, -jnp.inf)
        is_label &= columns.exist[None, :]
    largest = jnp.max(logits, axis=1)
    total = jnp.sum(jnp.exp(logits - largest[:, None]), axis=1)
    here = pl.ds(rows.start, rows.size)
    pltriton.store(largest_ref.at[tile, here], largest, mask=rows.exist)
    pltriton.store(total_ref.at[tile, here], total, mask=rows.exist)
    has_label = jnp.max(is_label.astype(jnp.int32), axis=1) > 0  # true in at most one tile of a row
    pltriton.store(of_label_ref.at[here], of_label, mask=rows.exist & has_label)


def _d_logits_kernel(x_ref, w_ref, label_ref, lse_ref, d_loss_ref, d_lse_ref, d_logits_ref, *, softcap, blocks):
    rows, _, columns, logits = _logits(x_ref, w_ref, blocks)
    capped = _capped(logits, softcap)
    # A probability is at most 1, but recomputed logits may round to more than the logsumexp of the forward.
    gradient = jnp.exp(jnp.minimum(capped - rows.load(lse_ref)[:, None], 0.0)) * rows.load(d_lse_ref)[:, None]
    is_label = rows.load(label_ref)[:, None] == columns.number[None, :]
    gradient -= jnp.where(is_label, rows.load(d_loss_ref)[:, None], 0.0)
    if softcap is not None:
        gradient *= 1.0 - jnp.square(capped / softcap)
    store_rows(d_logits_ref, rows, columns, gradient)
