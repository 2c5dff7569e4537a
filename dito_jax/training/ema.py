"""EMA of the parameters: exponential moving averages, one copy per decay rate, used for sampling."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def update_ema(ema: dict[str, Any], params: Any, decays: tuple[float, ...], step: Int[Array, ""]) -> dict[str, Any]:
    """One EMA update: ema += (1 - d) (params - ema), d = min(decay, (1 + step) / (10 + step)), for each decay rate.

    The lower d of early steps reduces the weight of the initial parameters. In this form the EMA of a parameter that
    never changes stays bit-identical to it.
    """
    seen = step.astype(jnp.float32)
    updated = {}
    for decay in decays:
        d = jnp.minimum(decay, (1 + seen) / (10 + seen))
        updated[str(decay)] = jax.tree.map(lambda a, p, d=d: a + (1 - d) * (p - a), ema[str(decay)], params)
    return updated
