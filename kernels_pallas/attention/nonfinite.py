"""Keeps NaN and inf of hidden keys and of other queries away from a query: a weight of 0 times NaN is NaN.

A query that sees a key or value with NaN or inf, or that has one itself, gets NaN, as do the gradients of the keys that
it sees. Nothing else changes. Without a mask every query sees every key, and nothing needs to be kept away.
"""

import jax.numpy as jnp


def finite(x):
    """x with 0 in place of NaN and inf."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def contained(forward, backward):
    """(forward, backward) of a kernel that multiplies hidden values by 0, with NaN kept where it belongs.

    The kernel gets finite arrays, and NaN is put into its results. The passes over the arrays take memory bandwidth, so
    a kernel that can do the same in its masked tiles (triton.py) does not use this.
    """

    def contained_forward(q, k, v, mask, sinks, *, return_lse, **static):
        if mask is None:
            out, residuals = forward(q, k, v, mask, sinks, return_lse=return_lse, **static)
            return out, (residuals, None)
        seen = mask.dense()
        bad = jnp.any(seen & _bad(k, v)[:, None, :], axis=2) | (_bad(q) & jnp.any(seen, axis=2))
        out, residuals = forward(*map(finite, (q, k, v)), mask, sinks, return_lse=return_lse, **static)
        outs = out if return_lse else (out,)
        outs = tuple(_with_nan(x, bad) for x in outs)
        return outs if return_lse else outs[0], (residuals, (mask, bad))

    def contained_backward(residuals, d_out, *, return_lse, **static):
        residuals, found = residuals
        if found is None:
            return backward(residuals, d_out, return_lse=return_lse, **static)
        mask, bad = found
        d_outs = d_out if return_lse else (d_out,)
        seen = mask.dense()
        for d in d_outs:
            bad = bad | (_bad(d if d.ndim == 4 else d[..., None]) & jnp.any(seen, axis=2))
        d_outs = tuple(map(finite, d_outs))
        d_q, d_k, d_v, *rest = backward(residuals, d_outs if return_lse else d_outs[0], return_lse=return_lse, **static)
        of_keys = jnp.any(seen & bad[:, :, None], axis=1)
        return _with_nan(d_q, bad), _with_nan(d_k, of_keys), _with_nan(d_v, of_keys), *rest

    return contained_forward, contained_backward


def _bad(*arrays):
    """(B, L): whether a token of any of the arrays (B, L, heads, H) has NaN or inf."""
    found = [jnp.any(~jnp.isfinite(x), axis=(2, 3)) for x in arrays]
    return found[0] if len(found) == 1 else found[0] | found[1]


def _with_nan(x, bad):
    """x (B, L, ...) with NaN at the tokens of `bad` (B, L)."""
    return jnp.where(bad.reshape(*bad.shape, *(1,) * (x.ndim - 2)), jnp.array(jnp.nan, x.dtype), x)
