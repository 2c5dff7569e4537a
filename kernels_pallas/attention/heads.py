"""Masked loads, stores and products of one attention head in Triton, whose width is split into powers of two.

Triton needs power-of-two block shapes. A head of width 72 is split into 64 + 16, with the last 8 columns masked;
padding to 128 would waste almost half of the arithmetic. Loads return zero outside the array; stores write nothing
there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ..pallas.triton import dot


def pieces(width: int) -> list[tuple[int, int]]:
    """(start, size) of powers of two >= 16 that cover a head width: (0, 64), (64, 16) for 72."""
    padded = pl.cdiv(width, 16) * 16
    sizes = [size for size in (256, 128, 64, 32, 16) if padded & size]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def rows(start, count: int) -> jax.Array:
    """start, ..., start + count - 1."""
    return start + jnp.arange(count, dtype=jnp.int32)


def _places(ref, batch, head, start: jax.Array, block: int):
    """Yields (view, mask) of each piece of ref[batch, start : start + block, head]; mask None if all is inside."""
    _, length, _, width = ref.shape
    for first, size in pieces(width):
        column = pl.ds(jnp.int32(first), size)  # JAX rejects a static slice past the edge
        row_exists = (rows(start, block) < length)[:, None] if length % block else None
        column_exists = (rows(first, size) < width)[None, :] if first + size > width else None
        exist = [x for x in (row_exists, column_exists) if x is not None]
        mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, exist), (block, size)) if exist else None
        yield ref.at[batch, pl.ds(start, block), head, column], mask


def load(ref, batch, head, start, block: int) -> list[jax.Array]:
    """Rows start, ... of one head of (B, T, N, H), as pieces."""
    places = _places(ref, batch, head, start, block)
    return [pltriton.load(at, mask=mask, other=None if mask is None else 0.0) for at, mask in places]


def store(ref, batch, head, start, values) -> None:
    """Writes pieces to rows start, ... of one head, cast to the dtype of ref."""
    places = _places(ref, batch, head, start, values[0].shape[0])
    for (at, mask), value in zip(places, values, strict=True):
        pltriton.store(at, value.astype(ref.dtype), mask=mask)


def load_row(ref, *index, start, block: int) -> jax.Array:
    """ref[*index, start : start + block], one number per position; zero past the edge."""
    mask = rows(start, block) < ref.shape[-1] if ref.shape[-1] % block else None
    at = ref.at[(*index, pl.ds(start, block))]
    return pltriton.load(at, mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def store_row(ref, *index, start, values) -> None:
    """ref[*index, start : start + block] = values, up to the edge."""
    block = values.shape[0]
    mask = rows(start, block) < ref.shape[-1] if ref.shape[-1] % block else None
    pltriton.store(ref.at[(*index, pl.ds(start, block))], values, mask=mask)


def zeros(block: int, ref) -> tuple[jax.Array, ...]:
    """Accumulators of zeros for `block` rows of a head, as pieces."""
    return tuple(jnp.zeros((block, size), jnp.float32) for _, size in pieces(ref.shape[3]))


def contained(values):
    """(values without the rows that have NaN or inf, 0 or NaN for each row): 0 times NaN is NaN in a product.

    Args:
      values: pieces (rows of the tile, width), which a tile multiplies by weights that are 0 where it is hidden.

    Returns:
      The pieces, and what to add to the weights of the visible rows, (rows of the tile,), so that these give NaN.
    """
    poison = functools.reduce(jnp.add, [jnp.sum(x.astype(jnp.float32) * 0.0, axis=1) for x in values])
    clean = [jnp.where((poison == 0.0)[:, None], x, jnp.zeros((), x.dtype)) for x in values]
    return clean, poison


def product(a, b) -> jax.Array:
    """a b^T in float32, summed over the pieces of the head width."""
    return functools.reduce(jnp.add, [dot(x, y, trans_b=True) for x, y in zip(a, b, strict=True)])
