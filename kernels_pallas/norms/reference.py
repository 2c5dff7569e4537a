"""Reference implementations of the norms in jnp; also implementation="xla"."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


Modulation = Float[Array, "B D"] | Float[Array, "B T D"]


def modulated_norm(
    x: Float[Array, "B T D"],
    scale: Modulation | None,
    shift: Modulation | None,
    weight: Float[Array, " D"] | None,
    *,
    kind: str,
    eps: float,
) -> Float[Array, "B T D"]:
    """norm(x) * weight * (1 + scale) + shift, in float32."""
    y = x.astype(jnp.float32)
    if kind == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight.astype(jnp.float32)[None, None]
    if scale is not None:
        y = y * (1 + _by_token(scale))
    if shift is not None:
        y = y + _by_token(shift)
    return y.astype(x.dtype)


def gated_residual_norm(
    x: Float[Array, "B T D"],
    branch: Float[Array, "B T D"],
    gate: Modulation,
    scale: Modulation | None,
    shift: Modulation | None,
    weight: Float[Array, " D"] | None,
    *,
    kind: str,
    eps: float,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """x + gate * branch in the dtype of x, and its modulated norm."""
    x_new = (x.astype(jnp.float32) + _by_token(gate) * branch.astype(jnp.float32)).astype(x.dtype)
    return x_new, modulated_norm(x_new, scale, shift, weight, kind=kind, eps=eps)


def _by_token(modulation: Modulation) -> Float[Array, "B _ D"]:
    """The modulation in float32 with a token dimension, of size 1 if all tokens share it."""
    wide = modulation.astype(jnp.float32)
    return wide if wide.ndim == 3 else wide[:, None]
