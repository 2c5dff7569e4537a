"""Was the network trained on this image? Three scores, each larger for images that it knows.

Every score is a function of a batch, `score(network, image, label) -> (B,)`, with `network(z, t, label)` as everywhere
in this project, and image i's score depends on image i alone: what chance draws is drawn once and given to all.
`make_scorer` compiles one and runs it over any number of images in batches of bounded memory.

    loss    minus the training loss, over fixed times and noises             (Yeom et al., arXiv 1709.01604)
    secmi   minus the error of one step out and back on the network's ODE    (SecMI, arXiv 2302.01316)
    pia     minus the error of a noise that the network itself named         (PIA, arXiv 2305.18355)

SecMI and PIA were written for DDPM, whose noise schedule bends; here the path is straight, and its ODE is
dz/dt = v(z, t). Both begin at t = START, the last time at which a prediction is not held back by path.MIN_GAP, with
the image itself in place of z: the adversary knows no noise that belongs to it.

Guarantees
----------
What a score means: nothing by itself. Members' scores against those of images from the same distribution that were
not trained on, in attack_report.py, say how well an adversary with the weights, the image and its label can tell them.

Assumes: the label given is the one the image was trained with, and the images are compared as they are; augmentation
blurs what was learned of one image, and these scores do not average over it.

Cannot show: that a network is private. Attacks with shadow models (LiRA) are stronger, and an average over images says
little of the one that is remembered best. A low figure is the absence of one proof, no proof of absence.
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

Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # z, t, label -> what it predicts
Score = Callable[[Network, jax.Array, jax.Array], jax.Array]  # network, image, label -> one number an image


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
    """-mean over t in `times` and over `draws` noises each of the flow matching loss.

    Each pair of time and noise is the same for all images, so that no image is lucky in its noise.
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
    """-mean (back(out(z)) - z)^2 of z, the image carried along the network's ODE from START to `time`.

    Euler's steps of (START - time) / steps lead towards the noise without chance; then follow one more step out, to
    time - width, and one back. Where the flow is as straight as it is around an image that was learned, the step back
    undoes the step out; the rest, width^2 (v(z', t') - v(z, t))^2, is SecMI's t-error for a straight path.

    Raises:
      UserError: the step out would leave [0, START].
    """
    width = (START - time) / steps
    if not width <= time < START or steps < 1:
        raise UserError(
            f"secmi: time {time} with {steps} steps; wanted a time below {START} that a step of "
            f"({START} - time) / steps does not carry past 0: give a later time, or more steps."
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
    """-|eps_0 - eps(z_t, t)| in the norm of `order`, z_t being the image with the network's own noise eps_0.

    eps_0 is the noise that the network sees in the image itself, asked at START; at t = `time` it is asked again, of
    the image with that noise. Two queries. `normalise` brings eps_0 to the mean absolute value of a normal variable,
    sqrt(2 / pi), as the paper's PIAN does: what a network names near the data may be of any size, and the time would
    not be that of the noise.
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
    """`scores(params, images, labels) -> (num,)`, float32, of `score` under the network that `build(params)` is.

    Memory is that of `batch_size` images, or of the few more that make it a multiple of `together`, the images that a
    network computes together. Compiled once for all parameters of one shape.

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
            chosen = np.minimum(start + np.arange(size), len(labels) - 1)  # one shape to compile
            found.append(np.asarray(of_batch(params, images[chosen], labels[chosen]))[: len(labels) - start])
        values = np.concatenate(found)
        if broken := int(np.sum(~np.isfinite(values))):
            raise UserError(
                f"{broken} of {len(values)} membership scores are not finite: the network's predictions overflow; "
                "audit an earlier checkpoint, or the average."
            )
        return values

    return scores


def _predicted(network, z, t, label, prediction: Quantity, target: Quantity):
    """What the network says of z at one time for all, as `target`, in float32; learn_sigma's channels are left out."""
    times = _times(z, t)
    said = network(z, times, label)[..., : z.shape[-1]].astype(jnp.float32)
    return path.convert(said, z, times, source=prediction, target=target)


def _times(image, t):
    return jnp.full((len(image),), t, jnp.float32)
