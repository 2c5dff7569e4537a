"""cuDNN's place in attention's table: what it is asked for, and what it is not. Its own kernels need a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import FLASH_ATTENTION, AttentionMask, hardware
from kernels_pallas.attention import cudnn


pytestmark = pytest.mark.recorded


STATIC = {"scale": 0.3, "softcap": None, "return_lse": False}


def on(gpu: hardware.Hardware):
    device = jax.sharding.AbstractDevice(device_kind=gpu.device_kind, platform="gpu", num_cores=gpu.cores)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.fixture
def by_xla(monkeypatch):
    """cuDNN's calls, computed by XLA; the keywords of each."""
    calls, attention = [], jax.nn.dot_product_attention

    def instead(*arrays, implementation, **options):
        assert implementation == "cudnn"
        calls.append(options)
        return attention(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    return calls


MASKS = {
    "none": lambda: None,
    "causal": lambda: AttentionMask.causal(12),
    "causal, fewer keys": lambda: AttentionMask.causal(16, 12),
    "packed": lambda: AttentionMask.packed(np.repeat([0, 1, -1], [5, 4, 3])[None]),
}


@pytest.mark.parametrize("name", MASKS)
def test_what_it_is_asked_for_is_the_same_attention(name, by_xla):
    mask = MASKS[name]()
    T = 12 if mask is None else mask.num_queries
    shapes = [(2, T, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16), (2, T, 4, 16)]
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    out, residuals = cudnn.forward(q, k, v, mask, None, **STATIC)
    got = out, *cudnn.backward(residuals, d_out, **STATIC)[:3]
    reference = functools.partial(FLASH_ATTENTION.reference, mask=mask, sinks=None, **STATIC)
    want, vjp = jax.vjp(reference, q, k, v)
    for mine, theirs in zip(got, (want, *vjp(d_out)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    # The dense tensor, where cuDNN has no mask of its own for it.
    assert ("mask" in by_xla[0], by_xla[0].get("is_causal", False)) == (
        name in ("causal, fewer keys", "packed"),
        name == "causal",
    )


@pytest.mark.parametrize(
    "gpu, change, why",
    [
        (hardware.H200, {}, None),
        (hardware.H200, {"dtype": jnp.float32}, "needs bfloat16 or float16, got float32"),
        (hardware.H200, {"H": 256}, None),
        (hardware.A100, {"H": 256}, "a multiple of 8 up to 128, got 256"),
        (hardware.H200, {"softcap": 5.0}, "no soft cap"),
        (hardware.H200, {"return_lse": True}, "no gradient of lse"),
        (hardware.H200, {"sinks": True}, "no sinks"),
        (hardware.H200, {"T": 77, "mask": AttentionMask.causal(77)}, "even T and S, got 77 and 77"),
        (hardware.H200, {"T": 77}, "even T and S"),
        (None, {}, "needs an NVIDIA GPU, got cpu"),
    ],
)
def test_it_says_what_it_cannot_do(gpu, change, why):
    T, H, dtype = (change.get(name, value) for name, value in (("T", 64), ("H", 64), ("dtype", jnp.bfloat16)))
    q = jax.ShapeDtypeStruct((1, T, 2, H), dtype)
    sinks = jax.ShapeDtypeStruct((2,), jnp.float32) if "sinks" in change else None
    static = STATIC | {name: change[name] for name in ("softcap", "return_lse") if name in change}
    with jax.default_device(jax.devices("cpu")[0]) if gpu is None else on(gpu):
        said = cudnn.unsupported(q, q, q, change.get("mask"), sinks, **static)
    assert said is None if why is None else why in (said or "")
