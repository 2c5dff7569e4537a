"""The noise of a private step: one draw of N(0, stddev^2) for each number of the clipped sum.

Guarantees
  - One draw a step, of the whole sum, whatever the mesh: `jax.random.normal` gives every device its piece of the same
    array. Accumulated parts are summed before it.
  - A key gives one draw; keys.py gives every step of every start of a run its own.
  - Not covered: threefry is a fast generator, not a cryptographic one, and its normals have 2^32 values at most; a
    float32 sum and its noise leave traces in the last bits of the result (https://arxiv.org/abs/2112.05307).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key


def add_noise(total: Any, key: Key[Array, ""], stddev: float) -> Any:
    """`total` with noise in every leaf, of a stream of the key for each leaf, in the order of jax.tree.leaves."""
    leaves, tree = jax.tree.flatten(total)
    noised = [
        leaf + stddev * jax.random.normal(jax.random.fold_in(key, number), leaf.shape, jnp.float32)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, noised)
