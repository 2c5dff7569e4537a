"""How evenly experts are used, what it costs not to, and the bias that evens it without a loss.

A `Load` is made of sums, so that the loads of pools, of devices and of parts of a batch add up to that of the whole:
jax.tree.map(jnp.add, ...), a sum over a leading dimension, or a psum.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from .routing import Assignments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """Sums over some tokens, float32."""

    rows: Any  # (E,): choices of each expert
    probability: Any  # (E,): of each expert, as the router scores it
    z: Any  # (): logsumexp(logits)^2
    tokens: Any  # (): how many


def expert_load(assignments: Assignments, probability: Float[Array, "T E"], logits: Float[Array, "T E"]) -> Load:
    """The load of one pool; `probability` is what the router's scores say, a row summing to 1."""
    z = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    return Load(
        rows=assignments.rows_of_experts().astype(jnp.float32),
        probability=jnp.sum(probability.astype(jnp.float32), axis=0),
        z=jnp.sum(z),
        tokens=jnp.float32(logits.shape[0]),
    )


def load_balance_loss(load: Load) -> Float[Array, ""]:
    """E sum_e f_e P_e: f_e an expert's share of all choices, P_e its mean probability. 1 where both are even.

    Gradients flow through P alone.

    Source: Switch Transformer, https://arxiv.org/abs/2101.03961, equations 4 to 6, with any number of choices a token.
    """
    share = load.rows / jnp.maximum(jnp.sum(load.rows), 1.0)
    return load.rows.size * jnp.sum(lax.stop_gradient(share) * load.probability / load.tokens)


def z_loss(load: Load) -> Float[Array, ""]:
    """The mean over tokens of logsumexp(logits)^2, which keeps logits small.

    Source: ST-MoE, https://arxiv.org/abs/2202.08906, equation 5.
    """
    return load.z / load.tokens


def update_bias(bias: Float[Array, " E"], rows: Num[Array, " E"], *, rate: float) -> Float[Array, " E"]:
    """bias + rate sign(mean(rows) - rows): up for experts with less than the mean, down for those with more.

    Source: https://arxiv.org/abs/2408.15664, algorithm 1.
    """
    return bias + rate * jnp.sign(jnp.mean(rows) - rows).astype(bias.dtype)
