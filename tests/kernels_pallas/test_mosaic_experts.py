"""The Hopper kernels of MoE, without a Hopper GPU: arithmetic and copies. test_ops.py lowers and compiles them.

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

from kernels_pallas import backend, hardware
from kernels_pallas.experts import EXPERT_MLP, GROUPED_MATMUL, cases, mosaic_gpu
from kernels_pallas.op import differentiable


pytestmark = pytest.mark.recorded


MATMULS = {
    "zipf": cases._matmul(203, 64, 320, 3, "zipf"),  # nothing divides a tile but the depth
    "half": cases._matmul(150, 128, 64, 5, "half"),  # empty experts, and NaN past the last row
    "one": cases._matmul(140, 64, 128, 3, "one"),
    "none": cases._matmul(24, 64, 64, 2, "none"),
    "f16": cases._matmul(5, 192, 64, 2, "random", jnp.float16),
}
MLPS = {
    "zipf": cases._mlp(70, 64, 192, 3, 2, "zipf"),  # a tile of gate's columns that reaches over their end
    "half": cases._mlp(77, 128, 64, 4, 1, "half"),
}


@pytest.fixture(autouse=True)
def nothing_promoted_in_silence():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def interpreted(function, *arguments):
    """Unoptimised, as the compiler takes longer than the run; the result, and whether copies raced."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    with backend.interpret_mode():
        run = jax.jit(function).lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 0})
        result = jax.block_until_ready(run(*arguments))
    return result, interpret_pallas_call.get_races().races_found


def both_ways(function, arrays, pull):
    """The result and the gradients."""
    out, vjp = jax.vjp(function, *arrays)
    return [out, *(g for g in jax.tree.leaves(vjp(pull)) if g.dtype != jax.dtypes.float0)]


def problem(op, case):
    arrays = case.random(jax.random.key(1))
    out = jax.eval_shape(op.reference, *arrays)
    return arrays, jax.random.normal(jax.random.key(2), out.shape).astype(out.dtype)


@functools.cache
def results(name: str, size: str):
    """(by the kernel, by the definition, whether copies raced)."""
    op, case = (GROUPED_MATMUL, MATMULS[size]) if name == "grouped_matmul" else (EXPERT_MLP, MLPS[size])
    arrays, pull = problem(op, case)
    kernel = differentiable(op.kernels["mosaic_gpu"])
    got, raced = interpreted(lambda *a: both_ways(kernel, a, pull), *arrays)
    return got, jax.jit(lambda *a: both_ways(op.reference, a, pull))(*arrays), raced


EVERY = [("grouped_matmul", size) for size in MATMULS] + [("expert_mlp", size) for size in MLPS]
every = pytest.mark.parametrize(("name", "size"), EVERY)


@every
def test_agrees_with_the_definition_both_ways(name, size):
    """To an ulp of the result's dtype at its largest, and two where it is a sum over a token's experts."""
    got, want, _ = results(name, size)
    for mine, wanted in zip(got, want, strict=True):
        assert (mine.shape, mine.dtype) == (wanted.shape, wanted.dtype)
        mine, wanted, eps = (np.asarray(x, np.float64) for x in (mine, wanted, jnp.finfo(want[0].dtype).eps))
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2 * eps * np.abs(wanted).max())


@every
def test_no_copy_races(name, size):
    assert not results(name, size)[2]


def test_rows_of_nobody_are_zero_and_keep_their_nan_to_themselves():
    case = MATMULS["half"]
    (x, _, sizes), _ = problem(GROUPED_MATMUL, case)
    total = int(sizes.sum())
    y, d_x, d_w = results("grouped_matmul", "half")[0]
    assert np.isnan(np.asarray(x, np.float32)[total:]).all() and total < len(x)
    np.testing.assert_array_equal(np.asarray(y[total:], np.float32), 0)
    np.testing.assert_array_equal(np.asarray(d_x[total:], np.float32), 0)
    np.testing.assert_array_equal(np.asarray(d_w[np.asarray(sizes) == 0], np.float32), 0)


def test_two_runs_agree_to_the_bit():
    arrays, _ = problem(GROUPED_MATMUL, MATMULS["zipf"])
    product = functools.partial(mosaic_gpu.product, kernel="forward", rest=True)
    (first, _), (second, _) = interpreted(product, *arrays), interpreted(product, *arrays)
    assert np.asarray(first).tobytes() == np.asarray(second).tobytes()


def test_two_problems_at_once():
    """vmap, as private training takes it."""
    case = MATMULS["zipf"]
    pair = [jnp.stack(both) for both in zip(*(case.random(jax.random.key(seed)) for seed in (3, 4)), strict=True)]
    got, raced = interpreted(jax.vmap(functools.partial(mosaic_gpu.product, kernel="forward", rest=True)), *pair)
    want = jax.vmap(GROUPED_MATMUL.reference)(*pair)
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2**-7, atol=2**-9)
    assert not raced


def test_a_store_before_its_fence_is_a_race():
    """So the detector sees these kernels' copies."""
    arrays, _ = problem(GROUPED_MATMUL, MATMULS["f16"])
    with mock.patch.object(plgpu, "commit_smem", lambda: None):
        _, raced = interpreted(functools.partial(mosaic_gpu.product, kernel="forward"), *arrays)
    assert raced


@pytest.mark.parametrize(("op", "case"), [(GROUPED_MATMUL, MATMULS["zipf"]), (EXPERT_MLP, MLPS["zipf"])])
def test_no_row_alone_is_copied_past_its_end(op, case):
    """Mosaic makes a plain copy of what is contiguous, and cuts it at the end of the array alone: a row's next is hit.

    The interpreter cuts it at the row's. Here copies are seen as they are asked for: those of one row either fill
    whole rows, or are no wider than what all widths are multiples of.
    """
    copies = []

    def copy_smem_to_gmem(source, target):
        copies.append((target.shape, target.ref.shape[-1]))
        real(source, target)

    real = plgpu.copy_smem_to_gmem
    with mock.patch.object(plgpu, "copy_smem_to_gmem", copy_smem_to_gmem), backend.interpret_mode():
        jax.make_jaxpr(op.kernels["mosaic_gpu"].forward)(*case.arrays)
    alone = [(shape[-1], width) for shape, width in copies if all(side == 1 for side in shape[:-1])]
    assert alone and any(width % mosaic_gpu.UNTUNED["up"].columns for _, width in alone)
    assert all(size == mosaic_gpu.DEPTH or width % size == 0 for size, width in alone), alone


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "reason"),
    [
        ((64, 64), "bfloat16", hardware.GPUS["a100"], "needs a Hopper GPU"),
        ((64, 64), "float32", hardware.H200, "needs a dtype among bfloat16, float16, got float32"),
        ((64, 72), "bfloat16", hardware.H200, "multiples of 64, got 64 x 72"),
        ((64, 448), "bfloat16", hardware.H200, None),
    ],
)
def test_says_why_not(shape, dtype, device, reason):
    gpu = jax.sharding.AbstractDevice(device_kind=device.device_kind, platform="gpu", num_cores=device.cores)
    x, w = jax.ShapeDtypeStruct((128, shape[0]), dtype), jax.ShapeDtypeStruct((4, *shape), dtype)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):
        said = mosaic_gpu.unsupported(x, w, jax.ShapeDtypeStruct((4,), "int32"))
    assert said is None if reason is None else reason in str(said)
