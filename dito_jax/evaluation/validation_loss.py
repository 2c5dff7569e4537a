"""Validation loss by bins of the timestep: the flow matching loss on held-out examples, with fixed noise and timesteps.

Example j of n has the timestep t_j, a random permutation of (i + 0.5) / n, i = 0, ..., n - 1, so that the timesteps
cover [0, 1] evenly (stratified sampling), and its own noise. Both are functions of the seed and j alone. The losses of
two checkpoints are thus measured on the same noisy images, and their difference has a low variance.

The loss of a bin is a mean over its examples. `validation_loss` is a mean over all examples, weighted by the density of
the training timesteps, so that it can be compared with the training loss. No class is dropped.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dito_jax.data import Source
from dito_jax.diffusion.loss import LossConfig, flow_matching_loss
from dito_jax.models.dit import DiTConfig
from dito_jax.sharding import constrain, whole_batch


@dataclasses.dataclass(frozen=True)
class ValidationLoss:
    """The validation loss of a network on one source; `batches(params)` yields the losses of all examples in order."""

    batches: Callable[[nnx.State], Iterator[Float[np.ndarray, " B"]]]
    times: Float[np.ndarray, " examples"]
    weights: Float[np.ndarray, " examples"]
    num_bins: int

    def figures(self, losses: Float[np.ndarray, " examples"]) -> dict[str, float]:
        """{"validation_loss": the weighted mean, "validation_loss/t_0_0.1": the mean for t from 0 to 0.1, ...}."""
        bins = np.minimum((self.times * self.num_bins).astype(int), self.num_bins - 1)
        found = {"validation_loss": float(np.average(losses.astype(np.float64), weights=self.weights))}
        for number in range(self.num_bins):
            name = f"validation_loss/t_{number / self.num_bins:.3g}_{(number + 1) / self.num_bins:.3g}"
            found[name] = float(losses[bins == number].mean(dtype=np.float64))
        return found

    def __call__(self, params: nnx.State) -> dict[str, float]:
        """The figures of the network with these parameters."""
        return self.figures(np.concatenate(list(self.batches(params))))


def make_validation_loss(
    graph: nnx.GraphDef,
    model: DiTConfig,
    loss: LossConfig,
    source: Source,
    *,
    num_examples: int,
    num_bins: int,
    batch_size: int,
    seed: int,
) -> ValidationLoss:
    """The validation loss on `num_examples` examples, evenly spaced in the source, or on all if there are fewer.

    Examples are read and computed in batches of `batch_size`, which does not change the result (unless model.pool > 1).
    There are no more bins than examples.

    Raises:
      UserError: an example cannot be read; all are read once here, before training.
    """
    chosen = np.linspace(0, len(source) - 1, min(num_examples, len(source))).astype(int)
    count = len(chosen)
    for number in chosen:
        source[int(number)]
    key_time, key_noise = jax.random.split(jax.random.key(seed))
    times = np.asarray(jax.random.permutation(key_time, (np.arange(count, dtype=np.float32) + 0.5) / count))

    @jax.jit
    def of_batch(
        params, image: Float[Array, "B h w c"], label: Int[Array, " B"], t: Float[Array, " B"], index: Int[Array, " B"]
    ):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key_noise, i), model.image_shape))(index)
        losses = flow_matching_loss(
            nnx.merge(graph, params), image, label, t, noise, prediction=loss.prediction, loss_type=loss.loss_type
        )
        return constrain(losses, ".")  # replicated, so that every process can read all losses

    def batches(params):
        size = whole_batch(min(batch_size, count), model.together)
        for start in range(0, count, size):
            index = np.minimum(start + np.arange(size), count - 1)  # the last batch is filled up: one shape
            examples = [source[int(chosen[j])] for j in index]
            image = np.stack([np.asarray(example["image"], np.float32) for example in examples])
            label = np.asarray([example["label"] for example in examples], np.int32)
            losses = of_batch(params, image, label, times[index], index.astype(np.int32))
            yield np.asarray(losses)[: count - start]

    weights = np.asarray(loss.time_density(jnp.asarray(times)), np.float64)
    return ValidationLoss(batches, times, weights, min(num_bins, count))
