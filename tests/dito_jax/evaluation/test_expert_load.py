"""Expert load, for routers whose assignments are known."""

import contextlib

import jax
import numpy as np
import pytest

from dito_jax.data.digits import Digits
from dito_jax.evaluation.expert_load import make_load_meter
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.training.state import split_model


pytestmark = pytest.mark.recorded


class Few(Digits):
    """30 held-out digits: eight devices cannot share them evenly."""

    def __len__(self) -> int:
        return 30


def load(few: bool = False, devices: int = 1, **make) -> np.ndarray:
    config = MoEDiTConfig(
        (8, 8, 1), 10, patch=4, depth=2, width=32, num_heads=2, num_experts=4, expert_hidden=16, **make
    )
    graph, shapes = split_model(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)
    if make["router"] == "sigmoid":
        to_one = np.array([[9, 0, 0, 0], [0, 0, 0, 9]], np.float32)  # scores are less than 1
        params["blocks"]["moe"]["mlp"]["bias"].set_value(to_one)
    measure = make_load_meter(graph, config, seed=0)
    assert measure is not None
    mesh = make_mesh(MeshConfig(data=1, expert=-1), np.array(jax.devices()[:devices]))
    with jax.set_mesh(mesh) if devices > 1 else contextlib.nullcontext():
        return measure(params, (Few if few else Digits)("validation"))


def test_one_expert_may_have_all():
    want = [[4, 0, 0, 0], [0, 0, 0, 4]]
    np.testing.assert_array_equal(load(router="sigmoid", active_experts=1), want)


def test_times_are_spread_evenly():
    np.testing.assert_array_equal(load(router="timestep"), np.ones((2, 4)))


@pytest.mark.parametrize("few", [False, True])
def test_it_is_measured_on_a_mesh_too(few):
    got, want = load(few, devices=4, router="softmax"), load(few, router="softmax")
    assert want.std() > 0.1
    np.testing.assert_allclose(got.mean(axis=1), 1, rtol=1e-6)
    # Where the images are as many, so are the rows; 30 become 32, two of them there twice.
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * 2 / 32 if few else 1e-6)


def test_a_dense_model_has_none():
    config = DiTConfig((8, 8, 1), 10, patch=4, depth=1, width=32, num_heads=2)
    assert make_load_meter(split_model(config)[0], config, seed=0) is None
