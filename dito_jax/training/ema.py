"""Exponential moving averages of the parameters: what is sampled from, one copy for each decay."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def update_ema(
    averages: dict[str, Any], params: Any, decays: tuple[float, ...], step: Int[Array, ""]
) -> dict[str, Any]:
    """average += (1 - d) (params - average), d = min(decay, (1 + step) / (10 + step)): early on it forgets the start.

    So written, a parameter that never changes is its own average, to the bit.
    """
    seen = step.astype(jnp.float32)
    updated = {}
    for decay in decays:
        d = jnp.minimum(decay, (1 + seen) / (10 + seen))
        updated[str(decay)] = jax.tree.map(lambda a, p, d=d: a + (1 - d) * (p - a), averages[str(decay)], params)
    return updated
