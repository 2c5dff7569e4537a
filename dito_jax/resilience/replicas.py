"""Whether devices that should hold the same numbers do: hardware that computes wrong, in silence, leaves one apart.

Where a parameter lies on several devices alike, each makes its own update of its own copy, from a gradient that all
have in common. A copy that once differs goes on to differ, and spoils every gradient that it takes part in.
"""

import collections
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dito_jax.checkpointing.checksums import Leaves, axes_of, piece_digest


def differing(leaves: Leaves) -> list[str]:
    """The paths of arrays whose copies are not the same, bit for bit. All processes must ask, and all hear of all.

    One array after the other: devices that are threads of one CPU may wait for each other for ever if several
    computations meet.
    """
    return [name for name, leaf in leaves.items() if leaf is not None and bool(_compare(leaf))]


def odd_devices(leaf: jax.Array) -> list[str]:
    """Devices of this process whose copy is not the one that most of them have; of two that differ, the second."""
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
    """Compiled for arrays that lie so; the axes that cut nothing are those that copies lie along."""
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
