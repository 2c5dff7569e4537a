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

from .. import arguments
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
    """The load of one routing pool; `probability` is the router's probabilities, each row summing to 1.

    Raises:
      ValueError: the arguments do not fit together.
    """
    name = "expert_load"
    if not isinstance(assignments, Assignments):
        raise ValueError(f"{name}: assignments must be a router's Assignments, got {arguments.kind_of(assignments)}.")
    probability, logits = arguments.floats(name, probability=probability, logits=logits)
    wanted = (assignments.num_tokens, assignments.num_experts)
    if not probability.shape == logits.shape == wanted:
        raise ValueError(
            f"{name}: probability {probability.shape} and logits {logits.shape} must be (T, E) = {wanted} of the "
            "assignments."
        )
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

    Raises:
      ValueError: `bias` and `rows` are no arrays of one shape (E,), or `rate` is no finite number.

    Source: https://arxiv.org/abs/2408.15664, algorithm 1.
    """
    name = "update_bias"
    [bias] = arguments.floats(name, bias=bias)
    [rows] = arguments.arrays(name, rows=rows)
    if bias.ndim != 1 or rows.shape != bias.shape:
        raise ValueError(f"{name}: bias {bias.shape} and rows {rows.shape} must be one number per expert, (E,).")
    rate = arguments.number(name, "rate", rate, "scale the step of the bias yourself")
    return bias + rate * jnp.sign(jnp.mean(rows) - rows).astype(bias.dtype)
