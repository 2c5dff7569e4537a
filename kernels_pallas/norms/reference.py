"""The definition: plain jnp, which is also implementation="xla"."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def modulated_norm(
    x: Float[Array, "B T D"],
    scale: Float[Array, "B D"],
    shift: Float[Array, "B D"],
    *,
    kind: str,
    eps: float,
) -> Float[Array, "B T D"]:
    """norm(x) * (1 + scale) + shift, in float32."""
    centred = x.astype(jnp.float32)
    if kind == "layer":
        centred = centred - jnp.mean(centred, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = centred * rstd * (1 + scale.astype(jnp.float32)[:, None]) + shift.astype(jnp.float32)[:, None]
    return y.astype(x.dtype)
