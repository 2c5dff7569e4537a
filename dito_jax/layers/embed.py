"""Embeddings of the conditioning: the timestep and the class label."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int

from dito_jax.layers.gradient_hooks import with_hook
from dito_jax.layers.linear import linear


NUM_FREQUENCIES = 256
TIME_SCALE = 1000.0  # scales t in [0, 1] to the range of DiT's 1000 integer timesteps


class TimeEmbedding(nnx.Module):
    """Timestep embedding: sines and cosines of t at 128 frequencies, then a two-layer MLP."""

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
    """Class embedding table; the last row is "no class", the unconditional input of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        table = normal(0.02)(rngs.params(), (num_classes + 1, width), jnp.float32)
        self.table = nnx.Param(table, dims="V D")

    def __call__(self, label: Int[Array, " B"]) -> Float[Array, "B D"]:
        row = self.table[...][label]
        return with_hook(self, "table", jax.nn.one_hot(label, self.table.shape[0], dtype=row.dtype), row)
