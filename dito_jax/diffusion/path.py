"""The linear path from noise to data (flow matching) and conversion between x-, v- and eps-prediction.

    z_t = t x + (1 - t) noise,     v = dz/dt = x - noise          (flow matching, arXiv 2210.02747; rectified flow,
    2209.03003)

TIME RUNS FROM NOISE (t = 0) TO DATA (t = 1), here and everywhere in the project. A network may predict the data x,
the noise eps or the velocity v; each can be converted to the others, given z and t. Divisors that vanish at an end of
the path are clamped to at least MIN_GAP (JiT, arXiv 2511.13720).
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float


Quantity = Literal["x", "v", "eps"]
NOISE_TIME, DATA_TIME = 0.0, 1.0
MIN_GAP = 0.05

_CONVERT = {
    ("x", "v"): lambda x, z, t: (x - z) / jnp.maximum(1 - t, MIN_GAP),
    ("x", "eps"): lambda x, z, t: (z - t * x) / jnp.maximum(1 - t, MIN_GAP),
    ("v", "x"): lambda v, z, t: z + (1 - t) * v,
    ("v", "eps"): lambda v, z, t: z - t * v,
    ("eps", "x"): lambda eps, z, t: (z - (1 - t) * eps) / jnp.maximum(t, MIN_GAP),
    ("eps", "v"): lambda eps, z, t: (z - eps) / jnp.maximum(t, MIN_GAP),
}


def interpolate(
    x: Float[Array, "B h w c"], noise: Float[Array, "B h w c"], t: Float[Array, " B"]
) -> Float[Array, "B h w c"]:
    """z_t = t x + (1 - t) noise."""
    t = t[:, None, None, None]
    return t * x + (1 - t) * noise


def quantity(x: Float[Array, "B h w c"], noise: Float[Array, "B h w c"], kind: Quantity) -> Float[Array, "B h w c"]:
    """The true value of the quantity `kind`: the target of a network that predicts it."""
    return {"x": x, "v": x - noise, "eps": noise}[kind]


def convert(
    value: Float[Array, "B h w c"],
    z: Float[Array, "B h w c"],
    t: Float[Array, " B"],
    *,
    source: Quantity,
    target: Quantity,
) -> Float[Array, "B h w c"]:
    """Converts a prediction of `source` to one of `target`, given z and t."""
    if source == target:
        return value
    return _CONVERT[source, target](value, z, t[:, None, None, None])
