"""Validation loss: known values of a network that predicts zero, and no dependence on batch, call or mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dito_jax.diffusion.loss import LossConfig
from dito_jax.evaluation.validation_loss import make_validation_loss
from dito_jax.models.dit import DiTConfig
from dito_jax.sharding import MeshConfig, make_mesh


pytestmark = pytest.mark.recorded


MODEL = DiTConfig((4, 4, 1), 10, patch=2, depth=1, width=32, num_heads=2)
COUNT = 30


class Constant:
    """Examples whose image i has the value (i + 1) / 10 everywhere."""

    image_shape, num_classes, augment = (4, 4, 1), 10, None

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int):
        return {"image": np.full(self.image_shape, (index + 1) / 10, np.float32), "label": np.int32(index % 10)}


def zero() -> tuple[nnx.GraphDef, nnx.State]:
    """A new DiT: its last layer is zero, so it predicts zero."""
    graph, params = nnx.split(MODEL.build(nnx.Rngs(0)), nnx.Param)
    return graph, params


def made(loss: LossConfig, graph, **changes):
    settings = dict(num_examples=COUNT, num_bins=5, batch_size=COUNT, seed=3) | changes
    return make_validation_loss(graph, MODEL, loss, Constant(), **settings)


def test_a_network_that_predicts_zero_has_the_loss_of_the_closed_form():
    """x-prediction, v-loss: |x|^2 / max(1 - t, 0.05)^2, whatever the noise; the mean is weighted like training."""
    graph, params = zero()
    loss = LossConfig(prediction="x", loss_type="v", time_mean=-0.5, time_std=1.2, time_shift=2.0)
    validation = made(loss, graph)
    figures = validation(params)
    times = validation.times.astype(np.float64)
    np.testing.assert_allclose(np.sort(times), (np.arange(COUNT) + 0.5) / COUNT, rtol=1e-6)
    assert not np.all(np.diff(times) > 0)  # a source is sorted by class: the order is random
    x = (np.arange(COUNT) + 1) / 10
    each = np.square(x / np.maximum(1 - times, 0.05))
    for number in range(5):
        inside = (times >= number / 5) & (times < (number + 1) / 5)
        name = f"validation_loss/t_{number / 5:.3g}_{(number + 1) / 5:.3g}"
        np.testing.assert_allclose(figures[name], each[inside].mean(), rtol=1e-5)
    unshifted = 2.0 * times / (1 + times)
    logit = np.log(unshifted / (1 - unshifted))
    density = np.exp(-0.5 * np.square((logit + 0.5) / 1.2)) / (unshifted * (1 - unshifted)) * 2.0 / np.square(1 + times)
    np.testing.assert_allclose(figures["validation_loss"], np.sum(density * each) / density.sum(), rtol=1e-5)
    assert len(figures) == 6


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform"])
def test_the_density_is_that_of_the_timesteps_that_are_drawn(sampling):
    loss = LossConfig(timestep_sampling=sampling, time_mean=-0.8, time_std=0.8, time_shift=3.0)
    drawn = np.asarray(loss.draw_times(jax.random.key(0), 200_000))
    share, edges = np.histogram(drawn, bins=20, range=(0, 1))
    grid = (jnp.arange(20_000) + 0.5) / 20_000
    mass = np.asarray(loss.time_density(grid), np.float64).reshape(20, -1).mean(axis=1) / 20
    np.testing.assert_allclose(mass.sum(), 1, atol=1e-4)
    np.testing.assert_allclose(share / len(drawn), mass, atol=5 * np.sqrt(0.25 / len(drawn)))
    assert len(edges) == 21


def test_losses_depend_on_seed_and_example_alone():
    graph, params = zero()
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    loss = LossConfig(prediction="v", loss_type="v")
    want = made(loss, graph)(params)
    assert want == made(loss, graph)(params)
    near = lambda found: pytest.approx(found, rel=1e-5)
    assert made(loss, graph, batch_size=7)(params) == near(want)
    assert made(loss, graph, seed=4)(params) != near(want)
    with jax.set_mesh(make_mesh(MeshConfig(data=4), np.array(jax.devices()[:4]))):
        assert made(loss, graph)(params) == near(want)


def test_fewer_examples_are_spread_over_the_source_and_fill_every_bin():
    graph, params = zero()
    loss = dataclasses.replace(LossConfig(), prediction="x", loss_type="x", timestep_sampling="uniform")
    figures = made(loss, graph, num_examples=3, num_bins=10)(params)
    x = np.array([1, 15, 30]) / 10  # the first, the middle and the last example
    assert figures["validation_loss"] == pytest.approx(np.square(x).mean())
    assert sorted(figures)[1:] == [
        "validation_loss/t_0.333_0.667",
        "validation_loss/t_0.667_1",
        "validation_loss/t_0_0.333",
    ]
    assert sum(figures[name] for name in list(figures)[1:]) == pytest.approx(np.square(x).sum())
