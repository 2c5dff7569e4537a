"""A bad step changes only the step counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.diffusion.loss import LossConfig
from dito_jax.models.dit import DiTConfig
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.training.health import (
    FINE,
    GRADIENT_SPIKE,
    LOSS_SPIKE,
    NOT_FINITE,
    GuardConfig,
    Health,
    deviation,
    examine,
)
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig, make_program


pytestmark = pytest.mark.recorded


MODEL = DiTConfig((4, 4, 1), num_classes=3, patch=2, depth=1, width=32, num_heads=2)
BATCH = {
    "image": jax.random.normal(jax.random.key(0), (8, 4, 4, 1)),
    "label": jnp.arange(8, dtype=jnp.int32) % 3,
}


GUARD = GuardConfig(window=8)


@functools.cache
def program(guard=GUARD, data=1):
    devices = make_mesh(MeshConfig(data=data), np.array(jax.devices()[:data]))
    loop = LoopConfig(steps=100, batch_size=8, compute_dtype="float32", ema_decays=(0.9,))
    return make_program(MODEL, LossConfig(), OptimizerConfig(warmup_steps=0), loop, devices, guard)


def with_image(change):
    return BATCH | {"image": change(BATCH["image"])}


def learned(state):
    return jax.tree.leaves((state.params, state.optimizer, state.ema))


def trained(made, steps: int):
    state = made.init()
    for _ in range(steps):
        state, metrics = made.step(state, BATCH)
        assert metrics["bad"] == FINE
    return state


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda image: image.at[0, 0, 0, 0].set(jnp.nan), NOT_FINITE),
        (lambda image: image.at[7].set(jnp.inf), NOT_FINITE),
        (lambda image: 100 * image, LOSS_SPIKE),
    ],
    ids=["one nan", "inf", "spike"],
)
def test_a_bad_step_leaves_all_that_is_learned_as_it_was(change, why, devices):
    made = program(data=devices)
    state = trained(made, 6)
    before = [np.asarray(leaf).tobytes() for leaf in learned(state)]
    key, step = np.asarray(state.key), int(state.step)
    state, metrics = made.step(state, with_image(change))
    assert metrics["bad"] == why
    assert [np.asarray(leaf).tobytes() for leaf in learned(state)] == before
    assert (int(state.step), int(state.health.bad), int(state.health.good)) == (step + 1, 1, 6)
    np.testing.assert_array_equal(state.key, key)
    state, metrics = made.step(state, BATCH)
    assert metrics["bad"] == FINE and np.isfinite(metrics["loss"])
    assert [np.asarray(leaf).tobytes() for leaf in learned(state)] != before


def test_steps_that_are_left_out_leave_no_trace_in_what_follows():
    """After a bad step all goes on as if that step had been one without learning: only the draws moved on."""
    made = program()
    state, _ = made.step(trained(made, 2), with_image(lambda image: image * jnp.nan))
    other = trained(made, 2)
    other = dataclasses.replace(other, step=other.step + 1)
    for a, b in zip(learned(made.step(state, BATCH)[0]), learned(made.step(other, BATCH)[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_deviations_a_spike_is_let():
    made = program(GuardConfig(spike_deviations=None, window=8))
    _, metrics = made.step(trained(made, 6), with_image(lambda image: 100 * image))
    assert metrics["bad"] == FINE


def test_a_gradient_may_be_a_spike_alone():
    health = Health.new(8)
    for loss in np.linspace(1.0, 1.1, 8):
        bad, health = examine(health, jnp.float32(loss), jnp.float32(loss), 10.0)
        assert bad == FINE
    assert examine(health, jnp.float32(1.0), jnp.float32(9.0), 10.0)[0] == GRADIENT_SPIKE
    assert examine(health, jnp.float32(9.0), jnp.float32(9.0), 10.0)[0] == LOSS_SPIKE
    assert examine(health, jnp.float32(0.001), jnp.float32(0.001), 10.0)[0] == FINE, "less is no spike"
    assert examine(health, jnp.float32(jnp.nan), jnp.float32(9.0), 10.0)[0] == NOT_FINITE
    assert examine(health, jnp.float32(1.0), jnp.float32(jnp.inf), 10.0)[0] == NOT_FINITE


def test_before_half_a_window_nothing_is_a_spike():
    health = Health.new(8)
    for _ in range(3):
        bad, health = examine(health, jnp.float32(1.0), jnp.float32(1.0), 10.0)
    assert examine(health, jnp.float32(99.0), jnp.float32(99.0), 10.0)[0] == FINE
    bad, health = examine(health, jnp.float32(1.0), jnp.float32(1.0), 10.0)
    assert examine(health, jnp.float32(99.0), jnp.float32(99.0), 10.0)[0] == LOSS_SPIKE


def test_the_window_forgets_and_bad_steps_do_not_enter_it():
    health = Health.new(4)
    for loss in (1, 2, 3, 4, 5, 6):
        _, health = examine(health, jnp.float32(loss), jnp.float32(2 * loss), None)
    _, health = examine(health, jnp.float32(jnp.inf), jnp.float32(1.0), None)
    assert sorted(map(float, health.loss)) == [3, 4, 5, 6]
    assert sorted(map(float, health.gradient_norm)) == [6, 8, 10, 12]
    assert (int(health.good), int(health.bad)) == (6, 1)
    _, health = examine(health, jnp.float32(7.0), jnp.float32(14.0), None)
    assert sorted(map(float, health.loss)) == [4, 5, 6, 7], "the oldest goes"


def test_deviations_are_those_of_the_median():
    values = jnp.array([1.0, 2.0, 3.0, 4.0, 100.0, jnp.nan])
    np.testing.assert_allclose(deviation(values, jnp.float32(3 + 7 * 1.4826)), 7, rtol=1e-6)
    np.testing.assert_allclose(deviation(jnp.full(4, 2.0), jnp.float32(2.1)), 0.1 / 0.02, rtol=1e-5)
