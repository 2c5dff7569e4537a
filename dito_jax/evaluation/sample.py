"""Class-conditional sampling from a network; the result does not depend on the batch size."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dito_jax.diffusion import path
from dito_jax.diffusion.guidance import guided
from dito_jax.diffusion.path import Quantity
from dito_jax.diffusion.sampler import SAMPLERS
from dito_jax.diffusion.time import schedule
from dito_jax.models.dit import DiT, DiTConfig
from dito_jax.sharding import constrain, whole_batch


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How samples are drawn."""

    sampler: Literal["euler", "heun"] = "heun"
    """ODE solver: Euler, or Heun with two network evaluations per step."""
    steps: int = 50
    """Number of solver steps."""
    time_shift: float = 1.0
    """Timestep shift in sampling; above 1 takes more steps near the noise."""
    guidance_scale: float = 1.5
    """Scale of classifier-free guidance (CFG); 1: no guidance."""
    guidance_interval: tuple[float, float] = (0.1, 1.0)
    """Timesteps between which guidance is applied; t = 0 is noise, t = 1 is data."""
    ema_decay: float | None = None
    """Decay rate of the EMA parameters to sample from; None: the first of train.ema_decays."""
    batch_size: int = 100
    """Maximum number of images per sampling batch, rounded up so that every device gets the same number."""


def make_draw(
    graph: nnx.GraphDef, model: DiTConfig, sample: SampleConfig, prediction: Quantity
) -> Callable[[nnx.State, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns the pure function `draw(params, label (B,), key, index (B,)) -> images (B, h, w, c)`.

    The noise of image i is a function of the key and index[i].
    """

    def draw(params, label, key, index):
        network = nnx.merge(graph, params)

        def velocity(z, t, label):
            times = jnp.full((z.shape[0],), t)
            predicted = network(z, times, label)[..., : z.shape[-1]].astype(jnp.float32)
            return path.convert(predicted, z, times, source=prediction, target="v")

        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), model.image_shape))(index)
        guided_velocity = guided(
            velocity,
            label,
            null_label=model.num_classes,
            scale=sample.guidance_scale,
            interval=sample.guidance_interval,
        )
        times = schedule(sample.steps, shift=sample.time_shift)
        # Replicated, so that every process can read all images.
        return constrain(SAMPLERS[sample.sampler](guided_velocity, noise, times), ". h w c")

    return draw


def make_batch_sampler(
    graph: nnx.GraphDef, model: DiTConfig, sample: SampleConfig, prediction: Quantity
) -> Callable[[nnx.State, Sequence[int], int], Iterator[np.ndarray]]:
    """Returns `draw(params, labels, seed)`, an iterator of batches of images (B, h, w, c), float32.

    Image i depends on its label, the seed and i only, not on the other images (unless model.pool > 1). Memory is that
    of one batch, however many labels there are.
    """
    draw_batch = jax.jit(make_draw(graph, model, sample, prediction))

    def draw(params, labels, seed):
        label, index = np.asarray(labels, np.int32), np.arange(len(labels), dtype=np.int32)
        # Few labels make a smaller batch, of a power of two images, so that few shapes are compiled.
        size = whole_batch(min(sample.batch_size, 1 << (len(labels) - 1).bit_length()), model.together)
        for start in range(0, len(labels), size):
            chosen = np.minimum(
                start + np.arange(size), len(labels) - 1
            )  # pad the last batch, to compile one shape only
            images = draw_batch(params, label[chosen], jax.random.key(seed), index[chosen])
            yield np.asarray(images)[: len(labels) - start]

    return draw


def make_sampler(
    graph: nnx.GraphDef, model: DiTConfig, sample: SampleConfig, prediction: Quantity
) -> Callable[[nnx.State, Sequence[int], int], np.ndarray]:
    """Returns `draw(params, labels, seed) -> images (len(labels), h, w, c)`: all batches of `make_batch_sampler`."""
    draw_batches = make_batch_sampler(graph, model, sample, prediction)
    return lambda params, labels, seed: np.concatenate(list(draw_batches(params, labels, seed)))


def sample(
    model: DiT,
    labels: Sequence[int],
    *,
    settings: SampleConfig = SampleConfig(),
    prediction: Quantity = "x",
    seed: int = 0,
) -> np.ndarray:
    """Images of a DiT in memory, float32 (len(labels), h, w, c): those of its classes `labels`.

    `prediction` is what the model was trained to predict (LossConfig.prediction). Compiles anew in every call; for a
    trained run, `load_run(path).sample` compiles once.
    """
    graph, params = nnx.split(model)
    return make_sampler(graph, model.config, settings, prediction)(params, labels, seed)


def balanced_labels(num: int, num_classes: int) -> list[int]:
    """`num` labels 0, 1, ..., num_classes - 1, 0, 1, ...: equally many of each class."""
    return [i % num_classes for i in range(num)]
