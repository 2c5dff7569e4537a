"""Positions: axial rotary embedding for queries and keys, and DiT's fixed sine-cosine table."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


Rotation = tuple[Float[Array, "T half_H"], Float[Array, "T half_H"]]  # cosines, sines


def axial_rotation(height: int, width: int, head_width: int, *, theta: float = 1e4) -> Rotation:
    """Angles of RoPE (arXiv 2104.09864 eq. 15) on a grid: half of a head's pairs turn with the row, half by column.

    Pair i of an axis turns by position * theta^(-i / (H/4)). Tokens are row-major.
    """
    quarter = head_width // 4
    frequency = theta ** (-np.arange(quarter) / quarter)
    rows, columns = np.divmod(np.arange(height * width), width)
    angles = np.concatenate([np.outer(rows, frequency), np.outer(columns, frequency)], axis=1)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Turns each pair (x_i, x_{i + H/2}) by its token's angle, in float32."""
    cos, sin = (a[None, :, None, :] for a in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def sincos_table(height: int, width: int, dim: int) -> np.ndarray:
    """DiT's fixed positions, (T, D) float32: half of the channels encode the column, half the row, each [sin | cos]."""
    frequency = 1e4 ** (-np.arange(dim // 4) / (dim // 4))
    rows, columns = np.divmod(np.arange(height * width), width)
    parts = [f(np.outer(axis, frequency)) for axis in (columns, rows) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)
