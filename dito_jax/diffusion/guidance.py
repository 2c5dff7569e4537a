"""Classifier-free guidance (CFG, arXiv 2207.12598), within an interval of timesteps (arXiv 2404.07724)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


Velocity = Callable[[Float[Array, "B h w c"], Float[Array, ""]], Float[Array, "B h w c"]]


def guided(
    velocity: Callable[..., Float[Array, "B h w c"]],
    label: Int[Array, " B"],
    *,
    null_label: int,
    scale: float,
    interval: tuple[float, float],
) -> Velocity:
    """v = v_null + scale (v_label - v_null) while interval[0] <= t <= interval[1], v_label otherwise.

    `velocity(z, t, label)` takes one scalar timestep for the batch. Both predictions are computed in one call on twice
    the batch.
    """

    def both(z, t):
        with_label, without = jnp.split(
            velocity(jnp.concatenate([z, z]), t, jnp.concatenate([label, jnp.full_like(label, null_label)])),
            2,
        )
        return without + scale * (with_label - without)

    def one(z, t):
        return velocity(z, t, label)

    def guided_velocity(z, t):
        if scale == 1.0:
            return one(z, t)
        return jax.lax.cond((interval[0] <= t) & (t <= interval[1]), both, one, z, t)

    return guided_velocity
