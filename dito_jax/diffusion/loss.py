"""The flow matching loss, for x-, v- or eps-prediction and x-, v- or eps-loss."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dito_jax.diffusion import path, time
from dito_jax.diffusion.path import Quantity


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The training loss. The defaults are JiT's (arXiv 2511.13720): predict the data, measure the velocity error."""

    prediction: Quantity = "x"
    """Quantity that the network predicts: the data (x), the velocity (v) or the noise (eps)."""
    loss_type: Quantity = "v"
    """Quantity whose squared error is the loss: x-loss, v-loss or eps-loss."""
    timestep_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the training timesteps."""
    time_mean: float = -0.8
    """Mean of the logit-normal distribution; a negative mean favours timesteps near the noise."""
    time_std: float = 0.8
    """Standard deviation of the logit-normal distribution."""
    time_shift: float = 1.0
    """Timestep shift in training; above 1 favours timesteps near the noise."""
    class_dropout_prob: float = 0.1
    """Probability of training an example without its class, which classifier-free guidance needs."""

    def draw_times(self, key: Key[Array, ""], num: int) -> Float[Array, " num"]:
        """Random training timesteps in (0, 1)."""
        if self.timestep_sampling == "uniform":
            t = time.uniform(key, num)
        else:
            t = time.logit_normal(key, num, mean=self.time_mean, std=self.time_std)
        return time.shift_time(t, self.time_shift)

    def time_density(self, t: Float[Array, " num"]) -> Float[Array, " num"]:
        """The probability density of `draw_times` at t in (0, 1)."""
        unshifted = time.unshift_time(t, self.time_shift)
        slope = self.time_shift / jnp.square(1 + (self.time_shift - 1) * t)
        if self.timestep_sampling == "uniform":
            return slope
        return slope * time.logit_normal_density(unshifted, mean=self.time_mean, std=self.time_std)


def flow_matching_loss(
    network: Callable[..., Float[Array, "B h w c_out"]],
    image: Float[Array, "B h w c"],
    label: Int[Array, " B"],
    t: Float[Array, " B"],
    noise: Float[Array, "B h w c"],
    *,
    prediction: Quantity,
    loss_type: Quantity,
) -> Float[Array, " B"]:
    """|convert(network(z_t, t, label)) - convert(truth)|^2, averaged over each image, in float32.

    Prediction and truth are converted in the same way, so a perfect network has loss zero for every `loss_type`. Output
    channels beyond the image's (learn_sigma) are ignored.
    """
    z = path.interpolate(image, noise, t)
    return flow_matching_error(network(z, t, label), z, image, t, noise, prediction=prediction, loss_type=loss_type)


def flow_matching_error(
    predicted: Float[Array, "B h w c_out"],
    z: Float[Array, "B h w c"],
    image: Float[Array, "B h w c"],
    t: Float[Array, " B"],
    noise: Float[Array, "B h w c"],
    *,
    prediction: Quantity,
    loss_type: Quantity,
) -> Float[Array, " B"]:
    """The flow matching loss of a prediction for z; see `flow_matching_loss`."""
    predicted = predicted[..., : image.shape[-1]].astype(jnp.float32)
    truth = path.quantity(image, noise, prediction)
    error = path.convert(predicted, z, t, source=prediction, target=loss_type) - path.convert(
        truth, z, t, source=prediction, target=loss_type
    )
    return jnp.mean(jnp.square(error), axis=(1, 2, 3))


def drop_labels(key: Key[Array, ""], label: Int[Array, " B"], *, rate: float, null_label: int) -> Int[Array, " B"]:
    """Class dropout: replaces each label by the null label with probability `rate`, for classifier-free guidance."""
    return jnp.where(jax.random.bernoulli(key, rate, label.shape), null_label, label)
