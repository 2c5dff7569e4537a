"""Reference implementations of the DP-SGD operations in float32 jnp, and their gradients."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import cost, rounding


HIGHEST = jax.lax.Precision.HIGHEST


def ghost_norm_sq(
    a: Float[Array, "B T D"],
    g: Float[Array, "B T F"],
    groups: Int[Array, "B T"] | None,
    *,
    bias: bool,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """sum_e ||sum_{t of e} a_t g_t^T||_F^2 of each example, plus ||sum_{t of e} g_t||^2 with a bias; and its bound.

    It computes the products of all pairs of rows, sum_{t,s} <a_t, a_s> <g_t, g_s>, if they are fewer flops than the
    matrices (cost.py); T^2 is then less than T (D + F). Groups are a mask of the pairs. Rounding can make a sum over
    pairs negative, so it is clipped at 0. The bound, an upper one that includes rounding (rounding.py), is not
    differentiated.
    """
    T, D, F = sizes = a.shape[1], a.shape[2], g.shape[2]
    a32, g32 = a.astype(jnp.float32), g.astype(jnp.float32)
    if groups is not None:  # padding rows may be NaN, and NaN times 0 is NaN
        a32, g32 = (jnp.where(groups[:, :, None] >= 0, x, 0) for x in (a32, g32))
    if T == 1:
        squares = jnp.sum(jnp.square(a32), axis=(1, 2)) + (1 if bias else 0)
        squares *= jnp.sum(jnp.square(g32), axis=(1, 2))
        return squares, _bound(squares, rounding.gamma(D + F + 4) * squares, jnp.sqrt(squares), T)
    lengths = rounding.lengths(a32, True, ones=bias), rounding.lengths(g32, True)
    spread = jnp.sum(lengths[0] * lengths[1], axis=1)
    if groups is None and not cost.pairs_are_fewer(T, D, F):
        d_w = jnp.einsum("btd,btf->bdf", a32, g32, precision=HIGHEST)
        squares = jnp.sum(jnp.square(d_w), axis=(1, 2))
        squares = squares + jnp.sum(jnp.square(jnp.sum(g32, axis=1)), axis=1) if bias else squares
        return squares, _bound(squares, rounding.of_sum(D * F) * squares, 2 * spread, T)
    of_a = jnp.einsum("btd,bsd->bts", a32, a32, precision=HIGHEST) + (1 if bias else 0)
    of_g = jnp.einsum("btf,bsf->bts", g32, g32, precision=HIGHEST)
    of_lengths = tuple(length[:, :, None] * length[:, None, :] for length in lengths)
    pairs, error = of_a * of_g, rounding.of_pairs(of_a, of_g, of_lengths, sizes)
    if groups is not None:
        same = groups[:, :, None] == groups[:, None, :]
        pairs, error = (jnp.where(same, x, 0) for x in (pairs, error))
    squares = jnp.maximum(jnp.sum(pairs, axis=(1, 2)), 0)
    return squares, _bound(squares, jnp.sum(error, axis=(1, 2)), spread, T)


def _bound(*given):
    return jax.lax.stop_gradient(rounding.upper_bound(*given))


def clip_reduce(
    a: Float[Array, "B T D"],
    g: Float[Array, "B T F"],
    c: Float[Array, " B"],
) -> Float[Array, "D F"]:
    """sum_b c_b sum_t a_bt g_bt^T; an example with c = 0 adds nothing, even if it is NaN."""
    counts = (c != 0)[:, None, None]
    a32, g32 = (jnp.where(counts, x.astype(jnp.float32), 0) for x in (a, g))
    return jnp.einsum("btd,btf->df", a32, c.astype(jnp.float32)[:, None, None] * g32, precision=HIGHEST)


def ghost_norm_sq_backward(residuals, d_out, **static):
    """d_a and d_g, by differentiating the reference.

    DP-SGD does not differentiate the clip factors, so there is no backward kernel.
    """
    a, g, groups = residuals
    _, vjp = jax.vjp(lambda a, g: ghost_norm_sq(a, g, groups, **static), a, g)
    return (*vjp(d_out), None)


def clip_reduce_backward(residuals, d_out):
    """d_a, d_g and d_c, by differentiating the reference; d_c is 0 where c is 0."""
    _, vjp = jax.vjp(clip_reduce, *residuals)
    return vjp(d_out)
