"""Sampling: independent of the batch size, also on a mesh that does not divide the batch."""

import dataclasses

import jax
import numpy as np
import pytest

from dito_jax.evaluation.sample import SampleConfig, make_sampler
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.training.state import split_model


pytestmark = pytest.mark.recorded


DENSE = DiTConfig((4, 4, 1), 10, patch=2, depth=1, width=32, num_heads=2)
EXPERTS = MoEDiTConfig(**vars(DENSE), num_experts=4, expert_hidden=16)
LABELS = [3, 1, 4, 1, 5, 9, 2]


def drawn(config: DiTConfig, batch_size: int, labels=LABELS) -> np.ndarray:
    graph, shapes = split_model(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)
    sample = SampleConfig(sampler="euler", steps=2, batch_size=batch_size)
    return make_sampler(graph, config, sample, "x")(params, labels, 0)


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_samples_do_not_depend_on_batch_or_mesh(config):
    want = drawn(config, 7)
    assert want.shape == (7, 4, 4, 1) and want.std() > 0.1
    near = 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(drawn(config, 3), want, rtol=0, atol=near)
    np.testing.assert_allclose(drawn(config, 7, LABELS[:2]), want[:2], rtol=0, atol=near)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2), np.array(jax.devices()[:4]))):
        np.testing.assert_allclose(drawn(config, 3), want, rtol=0, atol=near)


def test_whole_pools_are_drawn():
    """On one device, and on two that would each get a pool and a half."""
    config = dataclasses.replace(EXPERTS, pool=2)
    assert drawn(config, 6).shape == (7, 4, 4, 1)
    with jax.set_mesh(make_mesh(MeshConfig(data=2), np.array(jax.devices()[:2]))):
        assert np.isfinite(drawn(config, 6)).all()
