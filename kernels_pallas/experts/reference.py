"""Reference implementations of the MoE operations in jnp; also implementation="xla"."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .routing import Routing


def dispatch(x: Float[Array, "T D"], routing: Routing) -> Float[Array, "R D"]:
    """x[row_index]; padding rows are zero."""
    exists = _exist(routing.group_sizes, routing.row_index.shape[0])
    return jnp.where(exists[:, None], x[routing.row_index], 0)


def combine(y: Float[Array, "R D"], routing: Routing) -> Float[Array, "T D"]:
    """The sum of row_weight y over the rows of each token, in float32."""
    exists = _exist(routing.group_sizes, y.shape[0])[:, None]
    weighted = routing.row_weight[:, None].astype(jnp.float32) * jnp.where(exists, y, 0).astype(jnp.float32)
    weighted = jnp.where(exists, weighted, 0)
    num_tokens = routing.token_sizes.shape[0]
    return jax.ops.segment_sum(weighted, routing.row_index, num_tokens).astype(y.dtype)


def grouped_matmul(
    x: Float[Array, "R D"], w: Float[Array, "E D F"], group_sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
    """x[r] w[e] for each row r of expert e, in float32; padding rows are zero.

    A loop over experts multiplies all rows with each matrix: E times the work, but simple. The rows of other experts
    are zeros in it, so that NaN in them reaches neither the result nor the gradient of this expert's matrix.
    """
    num_rows, num_experts = x.shape[0], w.shape[0]
    x32 = jnp.where(_exist(group_sizes, num_rows)[:, None], x, 0).astype(jnp.float32)
    ends = lax.cumsum(group_sizes)
    expert = jnp.searchsorted(ends, jnp.arange(num_rows, dtype=ends.dtype), side="right")

    def add(total, one):
        number, w_of_one = one
        mine = (expert == number)[:, None]
        y = jnp.dot(jnp.where(mine, x32, 0), w_of_one.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        return jnp.where(mine, y, total), None

    zeros = jnp.zeros((num_rows, w.shape[2]), jnp.float32)
    return lax.scan(add, zeros, (jnp.arange(num_experts, dtype=expert.dtype), w))[0].astype(x.dtype)


def expert_mlp(
    x: Float[Array, "T D"], routing: Routing, w_gate_up: Float[Array, "E D F2"], w_down: Float[Array, "E F D"]
) -> Float[Array, "T D"]:
    """The sum of row_weight (silu(x w_gate) * (x w_up)) w_down over the experts of each token.

    Each product and the activation are computed in float32 and rounded to the dtype of x.
    """
    z = grouped_matmul(dispatch(x, routing), w_gate_up, routing.group_sizes)
    gate, up = jnp.split(z.astype(jnp.float32), 2, axis=-1)
    a = (jax.nn.silu(gate) * up).astype(x.dtype)
    return combine(grouped_matmul(a, w_down, routing.group_sizes), routing)


def _exist(group_sizes, num_rows: int):
    """Which rows belong to an expert; the others are padding."""
    return jnp.arange(num_rows, dtype=jnp.int32) < jnp.sum(group_sizes, dtype=jnp.int32)
