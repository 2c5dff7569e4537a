"""Expert load statistics, the load balancing loss, the router z-loss, and the loss-free bias update.

A `Load` consists of sums. So the loads of routing pools, devices and micro-batches can be added to give the load of the
whole batch: by jax.tree.map(jnp.add, ...), a sum over a leading dimension, or a psum.
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
    """Load statistics: sums over tokens, float32."""

    rows: Any  # (E,): the number of rows of each expert
    probability: Any  # (E,): the sum of the router's probabilities of each expert
    z: Any  # (): the sum of logsumexp(logits)^2
    tokens: Any  # (): the number of tokens


def expert_load(assignments: Assignments, probability: Float[Array, "T E"], logits: Float[Array, "T E"]) -> Load:
    """The load of one routing pool; `probability` is the router's probabilities, each row summing to 1."""
    z = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    return Load(
        rows=assignments.rows_of_experts().astype(jnp.float32),
        probability=jnp.sum(probability.astype(jnp.float32), axis=0),
        z=jnp.sum(z),
        tokens=jnp.float32(logits.shape[0]),
    )


def load_balance_loss(load: Load) -> Float[Array, ""]:
    """The load balancing loss E sum_e f_e P_e: f_e is an expert's share of all rows, P_e its mean probability.

    The loss is 1 if both are uniform. Its gradient flows through P only.

    Source: Switch Transformer, https://arxiv.org/abs/2101.03961, equations 4 to 6, for any number of experts per token.
    """
    share = load.rows / jnp.maximum(jnp.sum(load.rows), 1.0)
    return load.rows.size * jnp.sum(lax.stop_gradient(share) * load.probability / load.tokens)


def z_loss(load: Load) -> Float[Array, ""]:
    """The router z-loss: the mean over tokens of logsumexp(logits)^2. It penalises large logits.

    Source: ST-MoE, https://arxiv.org/abs/2202.08906, equation 5.
    """
    return load.z / load.tokens


def update_bias(bias: Float[Array, " E"], rows: Num[Array, " E"], *, rate: float) -> Float[Array, " E"]:
    """Loss-free load balancing: bias + rate sign(mean(rows) - rows), which raises the bias of underused experts.

    Source: https://arxiv.org/abs/2408.15664, algorithm 1.
    """
    return bias + rate * jnp.sign(jnp.mean(rows) - rows).astype(bias.dtype)
