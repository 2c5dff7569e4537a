"""The train step: a pure function from (state, batch) to (state, metrics)."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from dito_jax.diffusion import path
from dito_jax.diffusion.loss import LossConfig, drop_labels, flow_matching_error
from dito_jax.models.dit import Report
from dito_jax.training.ema import update_ema
from dito_jax.training.health import FINE, chosen, examine
from dito_jax.training.state import TrainState
from dito_jax.training.trainable import Names, divided, joined


Batch = dict[str, jax.Array]  # "image": Float[Array, "B h w c"], "label": Int[Array, " B"]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]
ComputeDtype = Literal["float32", "bfloat16"]


def make_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    *,
    null_label: int,
    decays: tuple[float, ...],
    compute_dtype: ComputeDtype,
    gradient_accumulation_steps: int,
    rebalance: Callable[[Any, Report], Any],
    spike_deviations: float | None,
    trainable: Names = (),
) -> Step:
    """The train step for this model and loss.

    Parameters are stored in float32 and cast to `compute_dtype` for the network, except those marked `float32`; loss,
    gradient sum and update are float32. Only `trainable` parameters change. After the update `rebalance` changes
    parameters without a gradient (router biases) from the network's report. With `gradient_accumulation_steps` > 1 the
    batch is computed in that many equal parts, which needs less memory and does not change the result. A bad step
    (health.py) changes only the step count; its metric "bad" is the reason.
    """

    def loss_of_part(params, frozen, part):
        network = nnx.merge(graph, cast(joined(params, frozen), compute_dtype))
        z = path.interpolate(part["image"], part["noise"], part["t"])
        prediction, report = network.with_report(z, part["t"], part["label"])
        losses = flow_matching_error(
            prediction, z, part["image"], part["t"], part["noise"], prediction=loss.prediction, loss_type=loss.loss_type
        )
        return jnp.mean(losses + report.losses), report

    def step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        drawn = draw(key, batch, loss, null_label)
        trained, frozen = divided(state.params, trainable)
        value_and_grad = lambda params, part: jax.value_and_grad(loss_of_part, has_aux=True)(params, frozen, part)
        (value, report), gradient = _accumulate(value_and_grad, trained, drawn, gradient_accumulation_steps)
        updates, moments = optimizer.update(gradient, state.optimizer, trained)
        params = rebalance(joined(jax.tree.map(jnp.add, trained, updates), frozen), report)
        params = joined(divided(params, trainable)[0], frozen)  # frozen parameters are not rebalanced
        ema = update_ema(state.ema, params, decays, state.step)
        norm = optax.tree.norm(gradient)
        bad, health = examine(state.health, value, norm, spike_deviations)
        params, moments, ema = chosen(bad == FINE, (params, moments, ema), (state.params, state.optimizer, state.ema))
        metrics = {"loss": value, "gradient_norm": norm, "bad": bad, **report.metrics}
        return TrainState(state.step + 1, params, moments, ema, state.key, health), metrics

    return step


def cast(params: nnx.State, dtype: ComputeDtype) -> nnx.State:
    """The parameters in the compute dtype, except those marked `float32`."""

    def narrowed(variable: nnx.Variable) -> nnx.Variable:
        keeps = variable.get_metadata().get("float32", False)
        return variable if keeps else variable.replace(variable[...].astype(dtype))

    return jax.tree.map(narrowed, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def draw(key, batch: Batch, loss: LossConfig, null_label: int) -> Batch:
    """Adds noise, timesteps and class dropout to a batch; drawn for the whole batch, independent of accumulation."""
    key_time, key_noise, key_drop = jax.random.split(key, 3)
    image, label = batch["image"].astype(jnp.float32), batch["label"]
    return {
        "image": image,
        "label": drop_labels(key_drop, label, rate=loss.class_dropout_prob, null_label=null_label),
        "t": loss.draw_times(key_time, image.shape[0]),
        "noise": jax.random.normal(key_noise, image.shape),
    }


def _accumulate(value_and_grad: Callable, params: Any, batch: Batch, parts: int):
    """Gradient accumulation: mean loss, report and gradient over `parts` equal parts of the batch."""
    if parts == 1:
        return value_and_grad(params, batch)
    pieces = cut(batch, parts)

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

    one = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda a: a[0], pieces))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), one)
    total, _ = jax.lax.scan(add, zero, pieces)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def cut(batch: Any, parts: int) -> Any:
    """Splits a batch into `parts` equal parts; part i has every parts-th example, so no example changes its device."""
    return jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)
