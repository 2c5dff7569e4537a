"""Everything that a step changes, as one pytree: what is donated, saved and restored."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, UInt32

from dito_jax.models.dit import DiTConfig
from dito_jax.training.health import Health
from dito_jax.training.trainable import Names, divided


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state after `step` steps. Every random draw of the run is a function of `key` and `step`."""

    step: Int[Array, ""]
    params: nnx.State
    optimizer: Any  # optax's state, of the parameters that are trained
    ema: dict[str, nnx.State]  # by decay, "0.999"
    key: UInt32[Array, "..."]  # raw key data, which a checkpoint can hold
    health: Health


def split_model(config: DiTConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and the shapes of its parameters; nothing is computed."""
    model = nnx.eval_shape(lambda: config.build(nnx.Rngs(0)))
    return nnx.split(model, nnx.Param)


def init_state(
    config: DiTConfig,
    optimizer: optax.GradientTransformation,
    decays: tuple[float, ...],
    seed: int,
    window: int,
    trainable: Names,
) -> TrainState:
    """Step 0; its health is of `window` steps, and its optimizer knows of what is trained alone.

    Pure: under jit with shardings it makes each shard where it lives.
    """
    key_params, key_train = jax.random.split(jax.random.key(seed))
    params = nnx.state(config.build(nnx.Rngs(key_params)), nnx.Param)
    ema = {str(decay): jax.tree.map(jnp.copy, params) for decay in decays}
    key = jax.random.key_data(key_train)
    moments = optimizer.init(divided(params, trainable)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, moments, ema, key, Health.new(window))


def begun_with(params: nnx.State, fresh: TrainState, like: TrainState) -> TrainState:
    """`fresh` with these parameters, and averages that begin as they do; laid out as `like`."""
    params = jax.tree.map(lambda leaf, wanted: jax.device_put(leaf, wanted.sharding), params, like.params)
    ema = {decay: jax.tree.map(jnp.copy, params) for decay in fresh.ema}
    return dataclasses.replace(fresh, params=params, ema=ema)
