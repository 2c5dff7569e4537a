"""Path and loss: consistent definitions of x, v and eps for every prediction type."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.diffusion import path
from dito_jax.diffusion.loss import drop_labels, flow_matching_loss


X, NOISE = jax.random.normal(jax.random.key(0), (2, 6, 4, 4, 3))
T = jnp.linspace(0.1, 0.9, 6)
KINDS = ("x", "v", "eps")


def test_the_path_ends_at_noise_and_data():
    np.testing.assert_array_equal(path.interpolate(X, NOISE, jnp.full(6, path.NOISE_TIME)), NOISE)
    np.testing.assert_array_equal(path.interpolate(X, NOISE, jnp.full(6, path.DATA_TIME)), X)


def test_velocity_is_the_derivative_of_the_path():
    derivative = jax.jvp(lambda t: path.interpolate(X, NOISE, t), (T,), (jnp.ones(6),))[1]
    np.testing.assert_allclose(path.quantity(X, NOISE, "v"), derivative, rtol=1e-6)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
def test_each_quantity_gives_each_other(source, target):
    z = path.interpolate(X, NOISE, T)
    got = path.convert(path.quantity(X, NOISE, source), z, T, source=source, target=target)
    np.testing.assert_allclose(got, path.quantity(X, NOISE, target), atol=1e-4)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_conversions_are_finite_at_both_ends(source, target, t):
    times = jnp.full(6, t)
    z = path.interpolate(X, NOISE, times)
    wrong = path.quantity(X, NOISE, source) + 1.0
    assert jnp.isfinite(path.convert(wrong, z, times, source=source, target=target)).all()


@pytest.mark.parametrize(("prediction", "loss_type"), list(itertools.product(KINDS, KINDS)))
def test_a_perfect_network_has_no_loss_and_a_wrong_one_has(prediction, loss_type):
    def network_off_by(offset):
        return lambda z, t, label: path.quantity(X, NOISE, prediction) + offset

    def loss(offset, times):
        return flow_matching_loss(
            network_off_by(offset),
            X,
            jnp.zeros(6, jnp.int32),
            times,
            NOISE,
            prediction=prediction,
            loss_type=loss_type,
        )

    for times in (T, jnp.linspace(0.0, 1.0, 6)):
        np.testing.assert_array_equal(loss(0.0, times), 0)
    assert (loss(0.5, T) > 1e-4).all()


def test_counting_velocity_errors_of_a_data_prediction_weights_them_by_the_gap():
    """|v - v'|^2 = |x - x'|^2 / (1 - t)^2."""
    off = lambda z, t, label: X + 0.1
    labels = jnp.zeros(6, jnp.int32)
    in_v = flow_matching_loss(off, X, labels, T, NOISE, prediction="x", loss_type="v")
    np.testing.assert_allclose(in_v, 0.01 / (1 - T) ** 2, rtol=1e-3)


def test_channels_beyond_the_images_are_ignored():
    with_sigma = lambda z, t, label: jnp.concatenate([X, jnp.full_like(X, jnp.nan)], axis=-1)
    loss = flow_matching_loss(with_sigma, X, jnp.zeros(6, jnp.int32), T, NOISE, prediction="x", loss_type="x")
    np.testing.assert_array_equal(loss, 0)


def test_labels_are_dropped_at_the_asked_rate():
    labels = drop_labels(jax.random.key(0), jnp.zeros(20_000, jnp.int32), rate=0.1, null_label=7)
    assert set(np.unique(labels)) == {0, 7}
    assert float((labels == 7).mean()) == pytest.approx(0.1, abs=0.01)
