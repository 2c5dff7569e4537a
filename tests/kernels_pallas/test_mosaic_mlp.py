"""The Hopper kernels of the gated MLP, without a Hopper GPU: arithmetic and copies; test_ops.py compiles them.

JAX's race detector sees copies and plain loads and stores; a product reads shared memory at once, unseen.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import GATED_MLP, backend, hardware
from kernels_pallas.mlp import cases, mosaic_gpu
from kernels_pallas.op import differentiable


pytestmark = pytest.mark.recorded


SIZES = {
    "odd": cases._case(203, 128, 192, "silu", gated=True),  # no tile is whole but in depth
    "one": cases._case(3, 64, 64, "gelu_tanh", gated=True),
    "f16": cases._case(130, 192, 320, "gelu_tanh", jnp.float16, gated=True),
}


@pytest.fixture(autouse=True)
def nothing_promoted_in_silence():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def interpreted(function, *arguments):
    """The result, and whether copies raced."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    result = jax.block_until_ready(in_interpreter(function, *arguments))
    return result, interpret_pallas_call.get_races().races_found


def in_interpreter(function, *arguments):
    """Unoptimised, as the compiler takes longer than the run."""
    with backend.interpret_mode():
        run = jax.jit(function).lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 0})
        return run(*arguments)


def both_ways(function, arrays, d_out):
    """The result and the gradients."""
    out, vjp = jax.vjp(function, *arrays)
    return [out, *vjp(d_out)]


@functools.cache
def results(size: str):
    """(by the kernel, by the reference, by the Triton kernel, whether copies raced)."""
    case = SIZES[size]
    arrays = case.random(jax.random.key(1))
    d_out = jax.random.normal(jax.random.key(2), arrays[0].shape).astype(arrays[0].dtype)
    kernel = differentiable(GATED_MLP.kernels["mosaic_gpu"], **case.static)
    got, raced = interpreted(lambda *a: both_ways(kernel, a, d_out), *arrays)
    reference = functools.partial(GATED_MLP.reference, **case.static)
    triton = differentiable(GATED_MLP.kernels["triton"], **case.static)
    same = in_interpreter(lambda *a: both_ways(triton, a, d_out), *arrays)
    return got, both_ways(reference, arrays, d_out), same, raced


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_definition_both_ways(size):
    """Gate, up and their gradients are rounded once on the way: three units in the last place at the largest."""
    got, want, _, _ = results(size)
    for mine, wanted in zip(got, want, strict=True):
        assert (mine.shape, mine.dtype) == (wanted.shape, wanted.dtype)
        mine, wanted, eps = (np.asarray(x, np.float64) for x in (mine, wanted, jnp.finfo(want[0].dtype).eps))
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=3 * eps * np.abs(wanted).max())


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_triton_kernel(size):
    """They round alike: what differs is the order of a sum."""
    got, _, same, _ = results(size)
    for mine, theirs in zip(got, same, strict=True):
        mine, theirs, eps = (np.asarray(x, np.float64) for x in (mine, theirs, jnp.finfo(got[0].dtype).eps))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=eps * np.abs(theirs).max())


@pytest.mark.parametrize("size", SIZES)
def test_no_copy_races(size):
    assert not results(size)[3]


def test_two_problems_at_once():
    """vmap, as private training takes it."""
    case = SIZES["odd"]
    pair = [jnp.stack(both) for both in zip(*(case.random(jax.random.key(seed)) for seed in (3, 4)), strict=True)]
    up = functools.partial(mosaic_gpu._up, activation="silu")
    got, raced = interpreted(jax.vmap(up), *pair[:2])
    for i in (0, 1):
        want, _ = interpreted(up, *(array[i] for array in pair[:2]))
        for mine, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(mine[i], np.float32), np.asarray(theirs, np.float32))
    assert not raced


def test_a_store_before_its_fence_is_a_race():
    """So the detector sees these kernels' copies."""
    x, w_gate_up, _ = SIZES["one"].random(jax.random.key(1))
    with mock.patch.object(plgpu, "commit_smem", lambda: None):
        _, raced = interpreted(functools.partial(mosaic_gpu._up, activation="silu"), x, w_gate_up)
    assert raced


def on(device: hardware.Hardware):
    """A mesh in force that says which GPU is meant."""
    gpu = jax.sharding.AbstractDevice(device_kind=device.device_kind, platform="gpu", num_cores=device.cores)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu))


def test_rows_that_fill_no_tile_lower_for_a_hopper():
    """The interpreter copies what TMA cannot: rows must be padded to those that it swizzles together."""
    arrays, static = SIZES["odd"].arrays, SIZES["odd"].static
    kernel = differentiable(GATED_MLP.kernels["mosaic_gpu"], **static)
    with on(hardware.H200):
        traced = jax.jit(lambda *arrays: both_ways(kernel, arrays, arrays[0])).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "gated_mlp_forward_up" in text and "gated_mlp_backward_dz" in text


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "reason"),
    [
        ((64, 64), "bfloat16", hardware.GPUS["a100"], "needs a Hopper GPU"),
        ((64, 64), "float32", hardware.H200, "needs all arrays in one dtype among bfloat16, float16, got"),
        ((64, 72), "bfloat16", hardware.H200, "multiples of 64, got D = 64 and F = 72"),
        ((72, 64), "bfloat16", hardware.H200, "multiples of 64, got D = 72 and F = 64"),
        ((1152, 3072), "bfloat16", hardware.H200, None),
    ],
)
def test_says_why_not(shape, dtype, device, reason):
    (D, F), of = shape, lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    with on(device):
        said = mosaic_gpu.unsupported(of(128, D), of(D, 2, F), of(F, D), activation="silu")
    assert said is None if reason is None else reason in str(said)
