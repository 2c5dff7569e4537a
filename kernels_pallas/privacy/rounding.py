"""Upper bounds of gradient norms that include rounding: a gradient clipped by its bound never exceeds the limit.

The model of float32 arithmetic: a sum of n terms, in any order, is off by at most gamma(n) times the sum of their
absolute values (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). The unit of rounding is taken
twice as large as float32's, 2^-23, because tensor cores truncate instead of rounding. Sums over n numbers that are
already products (`of_sum`) are added in tiles or trees, so that no number passes through more than 2 sqrt(n) additions.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


UNIT = 2.0**-23
SLACK = 1 + 2.0**-10  # for the rounding of the bounds themselves


def gamma(n: int) -> float:
    """The largest relative error of a sum of n terms, or of a product of two rows of n."""
    return n * UNIT / (1 - n * UNIT)


def of_sum(n: int) -> float:
    """The largest relative error of a sum of n numbers that is computed in tiles."""
    return gamma(2 * math.isqrt(n) + 2)


def lengths(x: Float[Array, "B T D"], counts, *, ones: bool = False) -> Float[Array, "B T"]:
    """The L2 norm of each row, rounded up, with a further column of ones if asked; 0 where not `counts`."""
    squares = jnp.einsum("btd,btd->bt", x, x, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    squares = squares * (1 + gamma(x.shape[2])) + (1 if ones else 0)
    return jnp.where(counts, jnp.sqrt(squares) * (1 + 4 * UNIT), 0)


def of_pairs(of_a, of_g, lengths: tuple, sizes: tuple[int, int, int]):
    """A bound of the error that each product of_a of_g of two Gram matrices adds to their sum.

    `of_a` and `of_g` are the computed products of the rows t and s; `lengths` are the products of the lengths of these
    rows, of a and of g; `sizes` is (T, D, F).
    """
    T, D, F = sizes
    a_error, g_error = gamma(D + 1) * lengths[0], gamma(F) * lengths[1]
    of_a, of_g = jnp.abs(of_a), jnp.abs(of_g)
    return of_g * a_error + of_a * g_error + a_error * g_error + of_sum(T * T) * (of_a * of_g)


def upper_bound(squares, error, spread, T: int) -> Float[Array, " B"]:
    """The bound of a squared norm whose square is at most `squares` + `error`.

    It is also one of the norm of the gradient as `clip_reduce` computes it, which adds T products of rows. `spread` is
    the sum over the rows of |a_t| |g_t|.
    """
    norm = jnp.sqrt(jnp.maximum(squares, 0) + SLACK * error) + SLACK * gamma(T + 1) * spread
    return jnp.square(norm) * (1 + 8 * UNIT)
