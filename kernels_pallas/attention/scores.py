"""Scores as the kernels keep them: times log2(e), because the chip computes exp2 and not exp."""

import dataclasses
import math

import jax.numpy as jnp


LOG2_E = math.log2(math.e)
# Where a running maximum starts; finite, for exp2(-inf - LOWEST) is 0 where exp2(-inf + inf) is nan.
LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Scores:
    """From products of a query and a key to scores times log2(e), and the derivative of that.

    score = scale product, or softcap tanh(scale product / softcap).
    """

    scale: float
    softcap: float | None

    @classmethod
    def of(cls, q, scale: float | None, softcap: float | None) -> "Scores":
        return cls(q.shape[-1] ** -0.5 if scale is None else scale, softcap)

    def __call__(self, products):
        """The scores, and tanh of the soft cap or None: what `through` needs."""
        if self.softcap is None:
            return products * (self.scale * LOG2_E), None
        tanh = jnp.tanh(products * (self.scale / self.softcap))
        return tanh * (self.softcap * LOG2_E), tanh

    def through(self, d_scores, tanh):
        """d_products / scale: the scale is left to the end, where it multiplies once."""
        return d_scores if tanh is None else d_scores * (1 - tanh * tanh)


def natural(lse):
    """log-sum-exp to base 2, (B, N, T), to base e, (B, T, N); -inf where a query sees nothing."""
    return jnp.swapaxes(jnp.where(lse == LOWEST, -jnp.inf, lse / LOG2_E), 1, 2)


def d_sinks(sinks, lse, delta):
    """d_sinks[n] = - sum_{b,t} weight of the sink * delta, for the sink's value is 0; lse and delta are (B, N, T)."""
    weights = jnp.exp2(sinks.astype(jnp.float32)[None, :, None] * LOG2_E - lse)
    return -jnp.sum(weights * delta, axis=(0, 2)).astype(sinks.dtype)
