"""What the network is told beside the image: the time and the class."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int

from dito_jax.layers.gradient_hooks import observed
from dito_jax.layers.linear import linear


NUM_FREQUENCIES = 256
TIME_SCALE = 1000.0  # t in [0, 1] moves the features as DiT's 1000 integer steps do


class TimeEmbedding(nnx.Module):
    """MLP(features(t)): sines and cosines at 128 frequencies, then two layers."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.up = linear(NUM_FREQUENCIES, width, ". D", init=normal(0.02), rngs=rngs)
        self.out = linear(width, width, "D .", init=normal(0.02), rngs=rngs)

    def __call__(self, t: Float[Array, " B"]) -> Float[Array, "B D"]:
        features = time_features(t).astype(self.up.kernel.dtype)
        return self.out(jax.nn.silu(self.up(features)))


def time_features(t: Float[Array, " B"]) -> Float[Array, "B 256"]:
    """[cos(1000 t w_i), sin(1000 t w_i)], w_i = 10^4^(-i / 128), in float32 (arXiv 2212.09748, in DiT's order)."""
    half = NUM_FREQUENCIES // 2
    frequency = jnp.exp(-jnp.log(1e4) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = TIME_SCALE * t.astype(jnp.float32)[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class ClassEmbedding(nnx.Module):
    """A row for each class and, last, one for "no class", which guidance needs."""

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        table = normal(0.02)(rngs.params(), (num_classes + 1, width), jnp.float32)
        self.table = nnx.Param(table, dims="V D")

    def __call__(self, label: Int[Array, " B"]) -> Float[Array, "B D"]:
        row = self.table[...][label]
        return observed(self, "table", jax.nn.one_hot(label, self.table.shape[0], dtype=row.dtype), row)
