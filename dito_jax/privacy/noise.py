"""The Gaussian noise of a private step: N(0, stddev^2) is added to each number of the clipped sum.

Guarantees
  - The noise is drawn once per step for the whole sum and does not depend on the mesh: each number depends on its
    position in the whole array, and every device draws those of its shard. Accumulated parts are summed before.
  - The numbers are computed from a ChaCha20 key stream with a 256-bit secret key (kernels_pallas/randomness); keys.py
    derives a new key for every step of every start of a run.
  - Not covered: attacks on the last bits of a float32 sum with noise (https://arxiv.org/abs/2112.05307).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, UInt32

from dito_jax.sharding import on_mesh, piece_start, spec, whole_dims
from kernels_pallas import secure_normal


def add_noise(total: nnx.State, key: UInt32[Array, " 8"], stddev: float) -> nnx.State:
    """Adds noise to every leaf of `total`; each leaf has its own nonce, its index in jax.tree.leaves."""
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
