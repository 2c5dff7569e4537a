"""Replica divergence: copies of replicated arrays are compared across devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.resilience import replicas
from dito_jax.resilience.replicas import differing, odd_devices


MESH = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
SPECS = {
    "whole": jax.P(),
    "rows": jax.P("fsdp"),
    "both": jax.P(("fsdp", "tensor"), None),
    "all": jax.P("data", ("fsdp", "tensor")),
}
X = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)


def laid(spec, device=None, bit=3):
    """X on the mesh, with a bit of one device's copy flipped."""
    sharding = jax.NamedSharding(MESH, spec)
    pieces = []
    for shard in jax.device_put(X, sharding).addressable_shards:
        values = np.array(shard.data)
        if shard.device == device:
            values.view(np.uint32)[-1, -1] ^= 1 << bit
        pieces.append(jax.device_put(values, shard.device))
    return jax.make_array_from_single_device_arrays(X.shape, sharding, pieces)


@pytest.mark.parametrize("name", SPECS)
def test_copies_that_are_alike_are_and_one_bit_of_one_is_seen(name):
    spec, last = SPECS[name], jax.devices()[-1]
    assert differing({"x": laid(spec), "absent": None, "step": jnp.int32(3)}) == []
    for bit in (0, 31):
        apart = laid(spec, last, bit)
        has_copies = name != "all"  # there each device has a piece of its own, and nothing to compare it with
        assert differing({"y": laid(spec), "x": apart}) == (["x"] if has_copies else [])
        if name != "both":  # of two copies neither is the usual one
            assert odd_devices(apart) == ([str(last)] if has_copies else [])
    text = replicas._comparer(X.shape, laid(spec).sharding).lower(laid(spec)).compile().as_text()
    assert "all-gather" not in text


def test_numbers_without_dims_are_compared_too():
    sharding = jax.NamedSharding(MESH, jax.P())
    pieces = [jax.device_put(np.int32(5 + (i == 3)), device) for i, device in enumerate(jax.devices())]
    apart = jax.make_array_from_single_device_arrays((), sharding, pieces)
    assert differing({"step": apart}) == ["step"] and odd_devices(apart) == [str(jax.devices()[3])]
