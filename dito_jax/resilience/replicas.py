"""Replica divergence (silent data corruption): compares the copies of replicated arrays across devices.

Each device updates its own copy of a replicated parameter from the same gradient. If faulty hardware changes one copy,
that copy stays different and corrupts every later gradient.
"""

import collections
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dito_jax.checkpointing.checksums import Leaves, axes_of, piece_digest


def differing(leaves: Leaves) -> list[str]:
    """Paths of the arrays whose copies are not bit-identical; a collective: all processes must call it.

    Arrays are compared one after the other, because CPU devices of one process may deadlock if several collectives run
    at the same time.
    """
    return [name for name, leaf in leaves.items() if leaf is not None and bool(_compare(leaf))]


def odd_devices(leaf: jax.Array) -> list[str]:
    """Devices of this process whose copy differs from the majority; of two that differ, the second is named."""
    odd, copies = [], collections.defaultdict(list)
    for shard in leaf.addressable_shards:
        copies[str(shard.index)].append((np.asarray(shard.data).tobytes(), str(shard.device)))
    for of_piece in copies.values():
        ((usual, _),) = collections.Counter(values for values, _ in of_piece).most_common(1)
        odd += [device for values, device in of_piece if values != usual]
    return odd


def _compare(leaf: jax.Array) -> jax.Array | bool:
    if not isinstance(leaf.sharding, jax.NamedSharding) or leaf.is_fully_addressable and len(leaf.devices()) == 1:
        return False
    return _comparer(leaf.shape, leaf.sharding)(leaf)


@functools.cache
def _comparer(shape: tuple[int, ...], sharding: jax.NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """Compiled comparison for one shape and sharding; copies lie along the mesh axes that shard no dimension."""
    cut = axes_of(sharding)
    copies = tuple(axis for axis in sharding.mesh.axis_names if axis not in cut)

    def of_piece(x: jax.Array) -> jax.Array:
        digest = piece_digest(x, shape, sharding)
        differs = (
            jnp.any(jax.lax.pmax(digest, copies) != jax.lax.pmin(digest, copies)) if copies else jnp.zeros((), bool)
        )
        return jax.lax.pmax(differs.astype(jnp.int32), cut) if cut else differs.astype(jnp.int32)

    run = jax.shard_map(of_piece, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=jax.P(), check_vma=False)
    return jax.jit(run)
