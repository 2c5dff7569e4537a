"""The three membership inference scores, for networks with known predictions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dito_jax.diffusion import path
from dito_jax.errors import UserError
from dito_jax.privacy.attack_report import attack_report
from dito_jax.privacy.attacks import START, loss_score, make_scorer, pia_score, secmi_score


pytestmark = pytest.mark.recorded


SHAPE = (4, 4, 1)
SCORES = {
    "loss": functools.partial(loss_score, key=jax.random.key(3), prediction="x", draws=8),
    "secmi": functools.partial(secmi_score, prediction="x"),
    "pia": functools.partial(pia_score, prediction="x"),
}


def pictures(seed, num=60):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (num, *SHAPE)), jnp.float32)


def knows(train):
    """The best denoiser of a distribution that is `train` and nothing else: it draws every point to a picture of it."""

    def network(z, t, label):
        away = jnp.sum(jnp.square(z[:, None] - t[:, None, None, None, None] * train), axis=(2, 3, 4))
        weight = jax.nn.softmax(-away / (2 * jnp.square(jnp.maximum(1 - t, 0.05)))[:, None], axis=1)
        return jnp.einsum("bn,nhwc->bhwc", weight, train)

    return network


def knows_the_distribution(_):
    """The best linear denoiser of pictures of variance 1/3: it has seen none of them."""

    def network(z, t, label):
        t = t[:, None, None, None]
        return z * (t / 3) / (t**2 / 3 + (1 - t) ** 2)

    return network


@pytest.mark.parametrize("name", SCORES)
def test_a_network_that_remembers_is_told_and_one_that_does_not_is_not(name):
    members, validation, label = pictures(0), pictures(1), jnp.zeros(60, jnp.int32)
    for build, low, high in ((knows, 0.95, 1.0), (knows_the_distribution, 0.3, 0.7)):
        scores = make_scorer(build, SCORES[name], batch_size=16)
        found = attack_report(scores(members, members, label), scores(members, validation, label)).auc
        assert low <= found.value <= high, (name, build, found)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_of_its_image_alone(name):
    images, label = pictures(2, 7), np.arange(7, dtype=np.int32) % 3
    scores = make_scorer(lambda offset: lambda z, t, label: z * 0.5 + label[:, None, None, None] * offset, SCORES[name],
                         batch_size=4)  # fmt: skip
    together = scores(0.1, images, label)
    assert together.shape == (7,) and len(set(together.tolist())) == 7
    for i in (0, 6):
        np.testing.assert_array_equal(scores(0.1, images[i : i + 1], label[i : i + 1]), together[i : i + 1])
    np.testing.assert_array_equal(scores(0.1, images[::-1], label[::-1])[::-1], together)


def test_the_loss_score_is_minus_the_mean_loss_over_the_times_and_noises():
    image, label = pictures(3, 2), jnp.zeros(2, jnp.int32)
    said = 0.25  # of every network input: the loss in the space of the data is then |0.25 - x|^2, whatever the noise
    score = loss_score(
        lambda z, t, label: jnp.full_like(z, said), image, label, key=jax.random.key(0), prediction="x", loss_type="x"
    )
    np.testing.assert_allclose(score, -np.mean((image - said) ** 2, axis=(1, 2, 3)), rtol=1e-6)


def test_secmi_is_the_error_of_a_step_out_and_back():
    """v = a z: every step multiplies, and what does not come back is width^2 a^2 of where it was."""
    a, image, time, steps = 0.7, pictures(4, 3), 0.6, 4
    score = secmi_score(
        lambda z, t, label: a * z, image, jnp.zeros(3, jnp.int32), prediction="v", time=time, steps=steps
    )
    width = (START - time) / steps
    z = image * (1 - a * width) ** steps
    np.testing.assert_allclose(score, -np.mean((a**2 * width**2 * z) ** 2, axis=(1, 2, 3)), rtol=1e-5)
    with pytest.raises(UserError, match="time 0.01 with 4 steps; wanted a time below .* more steps"):
        secmi_score(lambda z, t, label: z, image, jnp.zeros(3, jnp.int32), prediction="v", time=0.01, steps=steps)


@pytest.mark.parametrize("normalise", [False, True])
def test_pia_asks_again_of_the_image_with_the_noise_that_was_named(normalise):
    """eps = b z: named at the image, b x; asked again at t x + (1 - t) b x."""
    b, image, time = -1.5, pictures(5, 3), 0.4
    network = lambda z, t, label: b * z
    label = jnp.zeros(3, jnp.int32)
    score = pia_score(network, image, label, prediction="eps", time=time, normalise=normalise, order=4)
    noise = b * image
    if normalise:
        noise = noise * np.sqrt(2 / np.pi) / np.mean(np.abs(noise), axis=(1, 2, 3), keepdims=True)
    wanted = np.mean((noise - b * (time * image + (1 - time) * noise)) ** 4, axis=(1, 2, 3)) ** 0.25
    np.testing.assert_allclose(score, -wanted, rtol=1e-5)


def test_predictions_are_asked_for_before_they_are_held_back():
    """At START the distance to the data is that of MIN_GAP: a perfect network's velocity is not shrunk."""
    x, noise = pictures(6, 2), pictures(7, 2)
    t = jnp.full((2,), START)
    v = path.convert(jnp.asarray(x), path.interpolate(x, noise, t), t, source="x", target="v")
    np.testing.assert_allclose(v, x - noise, atol=1e-4)


def test_scores_that_are_not_finite_are_refused():
    scores = make_scorer(lambda _: lambda z, t, label: jnp.where(label[:, None, None, None] == 1, jnp.inf, z),
                         SCORES["loss"], batch_size=2)  # fmt: skip
    with pytest.raises(UserError, match="1 of 3 membership scores are not finite"):
        scores(None, pictures(8, 3), np.array([0, 1, 0], np.int32))
