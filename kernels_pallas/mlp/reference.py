"""Reference implementations of the MLPs in jnp; also implementation="xla"."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gated_mlp(
    x: Float[Array, "R D"],
    w_gate_up: Float[Array, "D G F"],
    w_down: Float[Array, "F D"],
    *,
    activation: str,
) -> Float[Array, "R D"]:
    """(f(x w_gate) * x w_up) w_down, in float32."""
    wide = x.astype(jnp.float32)
    gate, up = (_product(wide, w_gate_up[:, i]) for i in (0, 1))
    return _product(_activated(gate, activation) * up, w_down).astype(x.dtype)


def dense_mlp(
    x: Float[Array, "R D"],
    w_up: Float[Array, "D F"],
    b_up: Float[Array, " F"],
    w_down: Float[Array, "F D"],
    b_down: Float[Array, " D"],
    *,
    activation: str,
) -> Float[Array, "R D"]:
    """f(x w_up + b_up) w_down + b_down, in float32."""
    up = _product(x.astype(jnp.float32), w_up) + b_up.astype(jnp.float32)[None]
    return (_product(_activated(up, activation), w_down) + b_down.astype(jnp.float32)[None]).astype(x.dtype)


def _activated(x, activation: str):
    return jax.nn.silu(x) if activation == "silu" else jax.nn.gelu(x, approximate=True)


def _product(a, b):
    return jnp.dot(a, b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
