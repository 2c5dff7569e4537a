"""Expert load (utilization) of an MoE network on real data, for each expert of each layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dito_jax.data import Source
from dito_jax.diffusion import path
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.sharding import constrain, whole_batch


MOST = 256  # maximum number of images


def make_load_meter(
    graph: nnx.GraphDef, model: DiTConfig, *, seed: int
) -> Callable[[nnx.State, Source], np.ndarray] | None:
    """Returns `measure(params, source) -> (L, E)`: rows of each expert divided by the even share; None for a dense DiT.

    It uses up to 256 images of the source, each noised at its own timestep; the timesteps cover [0, 1] evenly.
    """
    if not isinstance(model, MoEDiTConfig):
        return None

    @jax.jit
    def rows(params, image, label, t, noise):
        counted = nnx.merge(graph, params).with_report(path.interpolate(image, noise, t), t, label)[1].rows
        return constrain(counted, "L .")

    def measure(params, source):
        count = whole_batch(min(len(source), MOST), model.together)
        examples = [source[int(i)] for i in np.linspace(0, len(source) - 1, count)]
        image = np.stack([np.asarray(example["image"], np.float32) for example in examples])
        label = np.asarray([example["label"] for example in examples], np.int32)
        key_time, key_noise = jax.random.split(jax.random.key(seed))
        t = jax.random.permutation(key_time, (jnp.arange(count) + 0.5) / count)
        noise = jax.random.normal(key_noise, image.shape)
        found = np.asarray(rows(params, image, label, np.asarray(t), np.asarray(noise)))
        return found / found.mean(axis=1, keepdims=True)

    return measure
