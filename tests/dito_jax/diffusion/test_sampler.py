"""Samplers compared with flows that have a closed-form solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.diffusion import time
from dito_jax.diffusion.guidance import guided
from dito_jax.diffusion.sampler import SAMPLERS


MEAN, STD = 2.0, 0.5


def gaussian_velocity(z, t):
    """E[x - noise | z] for x ~ N(MEAN, STD^2): the optimal velocity, whose flow maps noise to MEAN + STD noise."""
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (z - t * MEAN)


NOISE = jax.random.normal(jax.random.key(0), (16, 2, 2, 1))


def error(solver: str, steps: int) -> float:
    drawn = SAMPLERS[solver](gaussian_velocity, NOISE, time.schedule(steps))
    return float(jnp.abs(drawn - (MEAN + STD * NOISE)).max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver, order):
    ratio = error(solver, 32) / error(solver, 64)
    assert 2**order * 0.8 < ratio < 2**order * 1.3


@pytest.mark.parametrize("solver", SAMPLERS)
def test_samples_of_a_known_gaussian_are_right(solver):
    assert error(solver, 500) < {"euler": 5e-3, "heun": 5e-5}[solver]


def test_heun_never_asks_for_the_velocity_at_the_data_end():
    poisoned = lambda z, t: jnp.where(t == 1.0, jnp.nan, gaussian_velocity(z, t))
    assert jnp.isfinite(SAMPLERS["heun"](poisoned, NOISE, time.schedule(5))).all()


@pytest.mark.parametrize(("t", "inside"), [(0.05, False), (0.1, True), (0.5, True), (0.9, True), (0.95, False)])
def test_guidance_extrapolates_inside_its_interval_only(t, inside):
    velocity = lambda z, t, label: jnp.broadcast_to(label[:, None, None, None].astype(z.dtype), z.shape)
    label = jnp.full(16, 3)
    v = guided(velocity, label, null_label=10, scale=2.0, interval=(0.1, 0.9))(NOISE, jnp.float32(t))
    np.testing.assert_allclose(v, 10 + 2.0 * (3 - 10) if inside else 3.0)


def test_scale_one_is_no_guidance():
    velocity = lambda z, t, label: jnp.where(label[:, None, None, None] == 10, jnp.nan, z)
    v = guided(velocity, jnp.full(16, 3), null_label=10, scale=1.0, interval=(0.0, 1.0))(NOISE, jnp.float32(0.5))
    np.testing.assert_array_equal(v, NOISE)


def test_a_larger_shift_spends_more_steps_near_the_noise():
    plain, shifted = time.schedule(10), time.schedule(10, shift=3.0)
    assert (shifted[0], shifted[-1]) == (0.0, 1.0)
    assert (shifted[1:-1] < plain[1:-1]).all()
    np.testing.assert_allclose(time.shift_time(jnp.array(0.5), 3.0), 0.25)


def test_logit_normal_times_have_their_median_where_the_mean_says():
    t = time.logit_normal(jax.random.key(0), 50_000, mean=-0.8, std=0.8)
    logits = jnp.log(t / (1 - t))
    np.testing.assert_allclose([logits.mean(), logits.std()], [-0.8, 0.8], atol=0.02)
