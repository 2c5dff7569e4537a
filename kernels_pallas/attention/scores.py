"""Attention scores in base 2 (multiplied by log2(e)), because GPUs have an instruction for exp2 and none for exp."""

import dataclasses
import math

import jax.numpy as jnp


LOG2_E = math.log2(math.e)
# The initial running maximum. It is finite because exp2(-inf - LOWEST) is 0, while exp2(-inf + inf) is NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Maps products <q, k> to scores times log2(e); `through` is the derivative.

    score = scale product, or softcap tanh(scale product / softcap).
    """

    scale: float
    softcap: float | None

    @classmethod
    def of(cls, q, scale: float | None, softcap: float | None) -> "Scores":
        return cls(q.shape[-1] ** -0.5 if scale is None else scale, softcap)

    def __call__(self, products):
        """(the scores, the tanh of the soft cap or None); `through` needs the second."""
        if self.softcap is None:
            return products * (self.scale * LOG2_E), None
        tanh = jnp.tanh(products * (self.scale / self.softcap))
        return tanh * (self.softcap * LOG2_E), tanh

    def through(self, d_scores, tanh):
        """d_products / scale. The caller multiplies the accumulated gradient by the scale once, at the end."""
        return d_scores if tanh is None else d_scores * (1 - tanh * tanh)


def weights_of(score, lse):
    """exp2(score - lse), at most 1: recomputed scores may round to more than the log-sum-exp of the forward."""
    return jnp.exp2(jnp.minimum(score - lse, 0.0))


def delta_of(out, d_out):
    """out * d_out in float32, to be summed over the head width; 0 where out is, whatever d_out: it has no gradient."""
    out, d_out = out.astype(jnp.float32), d_out.astype(jnp.float32)
    return jnp.where(out == 0.0, 0.0, out * d_out)


def natural(lse):
    """Converts a log-sum-exp from base 2, (B, N, T), to base e, (B, T, N); -inf for a query without visible keys."""
    return jnp.swapaxes(jnp.where(lse == LOWEST, -jnp.inf, lse / LOG2_E), 1, 2)


def d_sinks(sinks, lse, delta):
    """d_sinks[n] = - sum_{b,t} weight of the sink * delta, as the sink's value is 0; lse and delta are (B, N, T)."""
    weights = weights_of(sinks.astype(jnp.float32)[None, :, None] * LOG2_E, lse)
    return -jnp.sum(weights * delta, axis=(0, 2)).astype(sinks.dtype)
