"""Membership inference attacks: three scores per image, which are larger for images that the network was trained on.

A score is a function `score(network, image, label) -> (B,)` of a batch, with `network(z, t, label)`. The score of image
i depends on image i only: random numbers are drawn once and used for all images. `make_scorer` compiles a score and
evaluates it over any number of images in batches.

    loss    minus the training loss, over fixed timesteps and noises               (Yeom et al., arXiv 1709.01604)
    secmi   minus the error of one step forth and back along the network's ODE     (SecMI, arXiv 2302.01316)
    pia     minus the change of the noise that the network itself predicted        (PIA, arXiv 2305.18355)

SecMI and PIA were published for DDPM, whose path is curved; here the path is linear with the ODE dz/dt = v(z, t). Both
start at t = START, the last time at which the divisor of a prediction is not clamped to path.MIN_GAP, with the image
itself as z, because the adversary does not know the noise of an image.

Guarantees
----------
Meaning: a score alone has no meaning. The scores of members and of images of the same distribution that were not
trained on, compared in attack_report.py, show how well an adversary with weights, image and label distinguishes them.

Assumptions: the given label is the one used in training, and images are not augmented; augmentation weakens what is
learned of a single image, and these scores do not average over it.

Cannot show: that a network is private. Attacks with shadow models (LiRA) are stronger, and an average over images says
little about the image that is memorised most. A low score does not prove privacy.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key

from dito_jax.diffusion import path
from dito_jax.diffusion.loss import flow_matching_loss
from dito_jax.diffusion.path import Quantity
from dito_jax.errors import UserError
from dito_jax.sharding import whole_batch


START = path.DATA_TIME - path.MIN_GAP

Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # z, t, label -> prediction
Score = Callable[[Network, jax.Array, jax.Array], jax.Array]  # network, image, label -> one score per image


def loss_score(
    network: Network,
    image: Float[Array, "B h w c"],
    label: Integer[Array, " B"],
    *,
    key: Key[Array, ""],
    prediction: Quantity,
    loss_type: Quantity = "v",
    times: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8),
    draws: int = 4,
) -> Float[Array, " B"]:
    """Minus the flow matching loss, averaged over t in `times` and `draws` noises for each.

    All images have the same timesteps and noises, so that the scores are comparable.
    """
    t = jnp.repeat(jnp.asarray(times, jnp.float32), draws)
    noise = jax.random.normal(key, (len(t), *image.shape[1:]))

    def add(total, draw):
        t, noise = draw
        at = _times(image, t)
        loss = flow_matching_loss(
            network, image, label, at, jnp.broadcast_to(noise, image.shape), prediction=prediction, loss_type=loss_type
        )
        return total + loss, None

    total, _ = jax.lax.scan(add, jnp.zeros(len(image)), (t, noise))
    return -total / len(t)


def secmi_score(
    network: Network,
    image: Float[Array, "B h w c"],
    label: Integer[Array, " B"],
    *,
    prediction: Quantity,
    time: float = 0.6,
    steps: int = 7,
) -> Float[Array, " B"]:
    """-mean (back(out(z)) - z)^2, where z is the image moved along the network's ODE from START to `time`.

    Deterministic Euler steps of (START - time) / steps lead towards the noise, followed by one more step, to time -
    width, and one step back. If the flow is straight, as around a learned image, the step back cancels the step before;
    the remaining error, width^2 (v(z', t') - v(z, t))^2, is SecMI's t-error for a linear path.

    Raises:
      UserError: the additional step would leave [0, START].
    """
    width = (START - time) / steps
    if not width <= time < START or steps < 1:
        raise UserError(
            f"secmi: time {time} with {steps} steps; wanted a time below {START} and at least one step width, "
            f"({START} - time) / steps: use a later time, or more steps."
        )

    def velocity(z, t):
        return _predicted(network, z, t, label, prediction, "v")

    def outwards(z, t):
        return z - width * velocity(z, t), None

    z, _ = jax.lax.scan(outwards, image, START - width * jnp.arange(steps))
    out, _ = outwards(z, time)
    back = out + width * velocity(out, time - width)
    return -jnp.mean(jnp.square(back - z), axis=(1, 2, 3))


def pia_score(
    network: Network,
    image: Float[Array, "B h w c"],
    label: Integer[Array, " B"],
    *,
    prediction: Quantity,
    time: float = 0.5,
    normalise: bool = True,
    order: int = 4,
) -> Float[Array, " B"]:
    """-|eps_0 - eps(z_t, t)| in the norm of `order`, where z_t is the image with the network's own noise eps_0.

    eps_0 is the noise that the network predicts for the image itself at START; the second query, at t = `time`, is for
    the image with that noise. `normalise` scales eps_0 to the mean absolute value of a normal variable, sqrt(2 / pi),
    as PIAN does in the paper: predictions near the data may have any scale, which would not fit the timestep.
    """
    noise = _predicted(network, image, START, label, prediction, "eps")
    if normalise:
        size = jnp.mean(jnp.abs(noise), axis=(1, 2, 3), keepdims=True)
        noise = noise * jnp.sqrt(2 / jnp.pi) / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)
    again = _predicted(network, path.interpolate(image, noise, _times(image, time)), time, label, prediction, "eps")
    return -(jnp.mean(jnp.abs(noise - again) ** order, axis=(1, 2, 3)) ** (1 / order))


def make_scorer(
    build: Callable[[Any], Network], score: Score, *, batch_size: int, together: int = 1
) -> Callable[[Any, np.ndarray, np.ndarray], np.ndarray]:
    """Returns `scores(params, images, labels) -> (num,)`, float32: `score` with the network `build(params)`.

    Images are computed in batches of `batch_size`, rounded up to a multiple of `together` (model.pool). Compiled once
    for all parameters of the same shapes.

    Raises:
      UserError: a score is not finite.
    """

    @jax.jit
    def of_batch(params, image, label):
        return score(build(params), image, label)

    def scores(params, images, labels):
        images, labels = np.asarray(images, np.float32), np.asarray(labels, np.int32)
        size, found = whole_batch(batch_size, together), []
        for start in range(0, len(labels), size):
            chosen = np.minimum(
                start + np.arange(size), len(labels) - 1
            )  # pad the last batch, to compile one shape only
            found.append(np.asarray(of_batch(params, images[chosen], labels[chosen]))[: len(labels) - start])
        values = np.concatenate(found)
        if broken := int(np.sum(~np.isfinite(values))):
            raise UserError(
                f"{broken} of {len(values)} membership scores are not finite: the network's predictions overflow; "
                "audit an earlier checkpoint, or the EMA parameters."
            )
        return values

    return scores


def _predicted(network, z, t, label, prediction: Quantity, target: Quantity):
    """The prediction for z at one timestep, converted to `target`, in float32, without learn_sigma channels."""
    times = _times(z, t)
    predicted = network(z, times, label)[..., : z.shape[-1]].astype(jnp.float32)
    return path.convert(predicted, z, times, source=prediction, target=target)


def _times(image, t):
    return jnp.full((len(image),), t, jnp.float32)
