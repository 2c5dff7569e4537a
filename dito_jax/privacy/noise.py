"""The noise of a private step: one draw of N(0, stddev^2) for each number of the clipped sum.

Guarantees
  - One draw a step, of the whole sum, whatever the mesh: a number depends on its place in the whole array, and every
    device makes those of its piece. Accumulated parts are summed before it.
  - The numbers are made of ChaCha20's key stream under 256 secret bits (kernels_pallas/randomness), which keys.py gives
    every step of every start of a run anew.
  - Not covered: a float32 sum and its noise leave traces in the last bits of the result
    (https://arxiv.org/abs/2112.05307).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, UInt32

from dito_jax.sharding import on_mesh, piece_start, spec, whole_dims
from kernels_pallas import secure_normal


def add_noise(total: nnx.State, key: UInt32[Array, " 8"], stddev: float) -> nnx.State:
    """`total` with noise in every leaf, each under a nonce of its own, in the order of jax.tree.leaves."""
    leaves, tree = jax.tree.flatten(total, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    noised = [leaf.replace(_noised(leaf, number, key, stddev)) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, noised)


def _noised(leaf: nnx.Variable, number: int, key: Array, stddev: float) -> Array:
    dims, x = whole_dims(leaf), leaf[...]
    nonce = jnp.array([number, 0, 0], jnp.uint32)
    draw = functools.partial(secure_normal, stddev=stddev, whole=x.shape)

    def piece(x, key):
        return draw(x, key, nonce, start=piece_start(spec(dims, jax.sharding.get_abstract_mesh()), x.shape))

    return on_mesh(piece, (dims, "."), dims)(x, key)
