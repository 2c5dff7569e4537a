"""The DP-SGD train step: a pure function from (state, batch) to (state, metrics).

    gradient = (clipped sum over the batch's examples + N(0, (sigma C)^2)) / expected batch size

The update and the EMA are post-processing of this gradient and have no privacy cost.

Guarantees
  - The state and the metrics depend on the examples only through the noised sum, except for the metrics that `internal`
    adds, which must not be released.
  - Every step changes the parameters, also with an empty batch, because skipping a step by its loss would leak
    information. The spike detection of non-private training is therefore absent; an example that is not finite counts
    as zero instead.
  - The divisor is the expected number of examples, which is public, and not the actual number.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from dito_jax.diffusion import path
from dito_jax.diffusion.loss import LossConfig, flow_matching_error
from dito_jax.privacy.clipping import ClippedSum, ExampleMetrics, Examples
from dito_jax.privacy.noise import add_noise
from dito_jax.privacy.settings import Backend
from dito_jax.training.ema import update_ema
from dito_jax.training.health import FINE
from dito_jax.training.state import TrainState
from dito_jax.training.step import Batch, ComputeDtype, Step, cast, cut, draw
from dito_jax.training.trainable import Names, divided, joined


def make_private_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    *,
    null_label: int,
    decays: tuple[float, ...],
    compute_dtype: ComputeDtype,
    gradient_accumulation_steps: int,
    clip_norm: float,
    noise_multiplier: float,
    expected_batch: float,
    noise_multiplicity: int,
    backend: Backend,
    microbatch: int,
    internal: bool,
    trainable: Names = (),
) -> Step:
    """The private train step for this model and loss.

    A batch has B units with m images each: "image" (B, m, h, w, c), "label" (B, m), "padding" bool (B, m), and the raw
    data of two keys, "draw_key" and "noise_key". The loss of a unit is the mean over its images and over
    `noise_multiplicity` draws of timestep and noise for each image (https://arxiv.org/abs/2210.09929). A unit without
    images is padding. Parameters that are not `trainable` do not change: they count in no norm and get no noise. With
    `gradient_accumulation_steps` > 1 the units are computed in that many parts; noise is added once, to the sum.
    """

    clipped_sum = ClippedSum(
        graph, functools.partial(draw_losses, config=loss), clip_norm, backend, microbatch,
        functools.partial(cast, dtype=compute_dtype), narrow=compute_dtype != "float32",
    )  # fmt: skip

    def step(state: TrainState, batch: Batch):
        examples, padding = _drawn(batch, loss, null_label, noise_multiplicity)
        trained, frozen = divided(state.params, trainable)
        total, measured = accumulated(clipped_sum, trained, frozen, examples, padding, gradient_accumulation_steps)
        noised = add_noise(total, batch["noise_key"], noise_multiplier * clipped_sum.sensitivity())
        gradient = jax.tree.map(lambda leaf: leaf / expected_batch, noised)
        updates, moments = optimizer.update(gradient, state.optimizer, trained)
        params = joined(jax.tree.map(jnp.add, trained, updates), frozen)
        ema = update_ema(state.ema, params, decays, state.step)
        metrics = {"gradient_norm": optax.tree.norm(gradient), "bad": jnp.full((), FINE)}
        metrics |= _internal(measured, padding, clip_norm) if internal else {}
        return TrainState(state.step + 1, params, moments, ema, state.key, state.health), metrics

    return step


def draw_losses(network, rows: Examples, *, config: LossConfig) -> Array:
    """The loss of each row, with the auxiliary losses of the routers."""
    z = path.interpolate(rows["image"], rows["noise"], rows["t"])
    predicted, report = network.with_report(z, rows["t"], rows["label"])
    error = flow_matching_error(
        predicted, z, rows["image"], rows["t"], rows["noise"], prediction=config.prediction, loss_type=config.loss_type
    )
    return error + report.losses


def _drawn(batch: Batch, loss: LossConfig, null_label: int, noise_multiplicity: int) -> tuple[Examples, Array]:
    """The rows of each unit, (B, m noise_multiplicity, ...), with noise and timesteps; and which units are padding."""
    absent = batch["padding"]  # (B, m)
    units, images = absent.shape
    rows = {
        name: jnp.repeat(batch[name].reshape(-1, *batch[name].shape[2:]), noise_multiplicity, axis=0)
        for name in ("image", "label")
    }
    rows = draw(jax.random.wrap_key_data(batch["draw_key"][:2]), rows, loss, null_label)
    examples = jax.tree.map(lambda a: a.reshape(units, images * noise_multiplicity, *a.shape[1:]), rows)
    present = jnp.where(absent, 0.0, 1.0)
    weight = present / jnp.maximum(jnp.sum(present, axis=1, keepdims=True), 1)
    return examples | {"weight": jnp.repeat(weight / noise_multiplicity, noise_multiplicity, axis=1)}, jnp.all(
        absent, axis=1
    )


def accumulated(
    clipped_sum: ClippedSum, params, frozen, examples: Examples, padding, parts: int
) -> tuple[Any, ExampleMetrics]:
    """Gradient accumulation: the clipped sum over `parts` parts of the batch; the metrics are concatenated."""
    clipped_sum = dataclasses.replace(clipped_sum, batch=padding.size)
    if parts == 1:
        return clipped_sum(params, examples, padding, frozen)

    def add(total, part):
        one, measured = clipped_sum(params, *part, frozen=frozen)
        return jax.tree.map(jnp.add, total, one), measured

    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), params)
    total, measured = jax.lax.scan(add, zero, cut((examples, padding), parts))
    return total, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(-1), measured)


def _internal(measured: ExampleMetrics, padding: Array, clip_norm: float) -> dict[str, Array]:
    """Metrics of the private examples, which must not be released."""
    count = jnp.maximum(jnp.sum(~padding), 1)
    mean = lambda values: jnp.sum(jnp.where(padding, 0, values)) / count
    return {
        "internal_loss": mean(measured.loss),
        "internal_norm": mean(measured.norm),
        "internal_clipped": mean((measured.norm > clip_norm).astype(jnp.float32)),
        "internal_examples": jnp.sum(~padding),
    }
