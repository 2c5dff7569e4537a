"""Sharding: the rules, kernels on a mesh, and a training run that comes out the same on one device and on eight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.data import DigitsData, batches
from dito_jax.diffusion.loss import LossConfig
from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig
from dito_jax.sharding import MeshConfig, make_mesh, on_mesh, spec
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig, make_program
from dito_jax.training.step import cut


pytestmark = pytest.mark.recorded


def mesh(num: int = 8, **sizes: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(**sizes), np.array(jax.devices()[:num]))


@pytest.mark.parametrize(
    ("sizes", "dims", "want"),
    [
        (dict(data=8), "B T D", jax.P("data", None, None)),
        (dict(data=2, fsdp=4), "B T D", jax.P(("data", "fsdp"), None, None)),
        (dict(data=2, fsdp=4), "D F", jax.P("fsdp", None)),
        (dict(data=2, fsdp=2, tensor=2), "D K . H", jax.P("fsdp", "tensor", None, None)),
        (dict(data=2, fsdp=2, tensor=2), "B T N H", jax.P(("data", "fsdp"), None, "tensor", None)),
        (dict(data=2, fsdp=2, tensor=2), "L F D", jax.P(None, "tensor", "fsdp")),
    ],
)
def test_an_axis_shards_the_first_dim_that_claims_it(sizes, dims, want):
    assert spec(dims, mesh(**sizes)) == want


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(data=3), "data=3, fsdp=1, expert=1, tensor=1 does not use exactly the 8 available devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one of them -1"),
        (MeshConfig(data=0), "positive"),
        (MeshConfig(data=-1, fsdp=3), "does not use exactly"),
    ],
)
def test_impossible_meshes_are_refused(config, words):
    with pytest.raises(UserError, match=words):
        config.resolve(8)


def test_minus_one_takes_what_is_left():
    assert MeshConfig(data=-1, tensor=2).resolve(8) == {"data": 4, "fsdp": 1, "expert": 1, "tensor": 2}


def test_a_function_on_the_mesh_gets_its_own_piece_and_gathers_nothing():
    seen = []

    def kernel(q, k):
        seen.append((q.shape, k.shape))
        return q * k.sum()

    with jax.set_mesh(mesh(data=2, fsdp=2, tensor=2)):
        sharded = lambda dims: jax.NamedSharding(jax.sharding.get_mesh(), spec(dims, jax.sharding.get_mesh()))
        q = jax.device_put(jnp.ones((8, 6, 4, 16)), sharded("B T N H"))
        k = jax.device_put(jnp.ones((8, 6, 2, 16)), sharded("B S K H"))
        call = jax.jit(on_mesh(kernel, ("B T N H", "B S K H"), "B T N H"))
        text = call.lower(q, k).compile().as_text()
        assert call(q, k).sharding.spec == spec("B T N H", jax.sharding.get_mesh())
    assert seen[0] == ((2, 6, 2, 16), (2, 6, 1, 16))
    assert "all-gather" not in text


MODEL = DiTConfig((8, 8, 1), num_classes=10, patch=2, depth=2, width=64, num_heads=4)


def losses(num_devices: int, steps: int = 20, gradient_accumulation_steps: int = 1, **sizes: int) -> list[float]:
    """Of the first steps of training on digits, in float32."""
    loop = LoopConfig(
        steps=steps,
        batch_size=32,
        gradient_accumulation_steps=gradient_accumulation_steps,
        compute_dtype="float32",
        ema_decays=(0.99,),
    )
    devices = mesh(num_devices, **sizes)
    stream = batches(DigitsData().open("train"), batch_size=32, seed=0, threads=0)
    with jax.set_mesh(devices):
        optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=2)
        program = make_program(MODEL, LossConfig(), optimizer, loop, devices)
        state, found = program.init(), []
        for _ in range(steps):
            batch = jax.device_put(next(stream), jax.tree.map(lambda leaf: leaf.sharding, program.batch))
            state, metrics = program.step(state, batch)
            found.append(float(metrics["loss"]))
        kernel = state.params["blocks"]["attention"]["qkv"]["kernel"][...]
        assert kernel.sharding.spec == spec("L D K . H", devices), "parameters stay where the rules put them"
    return found


@pytest.fixture(scope="module")
def losses_on_one_device() -> list[float]:
    return losses(1, data=1)


@pytest.mark.parametrize(
    "sizes", [dict(data=8), dict(data=1, fsdp=8), dict(data=2, fsdp=2, tensor=2)], ids=lambda s: "x".join(s)
)
def test_eight_devices_train_to_the_losses_of_one(sizes, losses_on_one_device):
    got = losses(8, **sizes)
    assert got[-1] < 0.9 * got[0]
    np.testing.assert_allclose(got, losses_on_one_device, rtol=1e-5)


def test_accumulation_changes_memory_and_not_the_result(losses_on_one_device):
    np.testing.assert_allclose(losses(1, data=1, gradient_accumulation_steps=4), losses_on_one_device, rtol=1e-5)


def test_parts_of_a_batch_stay_on_their_devices():
    devices = mesh(data=8)
    of_batch, of_parts = (jax.NamedSharding(devices, jax.P(*dims)) for dims in (("data",), (None, "data")))
    batch = jax.device_put(jnp.arange(32), of_batch)
    parts = jax.jit(lambda batch: cut(batch, 2), out_shardings=of_parts)
    np.testing.assert_array_equal(np.sort(parts(batch), axis=None), batch)
    assert not re.search(r"all-|collective-", parts.lower(batch).compile().as_text())
