"""The train state: everything that a step changes, as one pytree that is donated, saved and restored."""

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
    """The state after `step` steps; every random number of a step is a function of `key` and `step`."""

    step: Int[Array, ""]
    params: nnx.State
    optimizer: Any  # optax state of the trained parameters
    ema: dict[str, nnx.State]  # EMA parameters by decay rate, "0.999"
    key: UInt32[Array, "..."]  # raw key data, which a checkpoint can store
    health: Health


def split_model(config: DiTConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's graph and the shapes of its parameters; nothing is computed."""
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
    """The initial state (step 0); `window` is that of GuardConfig, the optimizer state covers `trainable` only.

    A pure function: under jit with output shardings each shard is created on its own device.
    """
    key_params, key_train = jax.random.split(jax.random.key(seed))
    params = nnx.state(config.build(nnx.Rngs(key_params)), nnx.Param)
    ema = {str(decay): jax.tree.map(jnp.copy, params) for decay in decays}
    key = jax.random.key_data(key_train)
    moments = optimizer.init(divided(params, trainable)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, moments, ema, key, Health.new(window))


def warm_started(params: nnx.State, fresh: TrainState, like: TrainState) -> TrainState:
    """Warm start: `fresh` with these parameters, also as the EMA parameters, sharded as `like`."""
    params = jax.tree.map(lambda leaf, wanted: jax.device_put(leaf, wanted.sharding), params, like.params)
    ema = {decay: jax.tree.map(jnp.copy, params) for decay in fresh.ema}
    return dataclasses.replace(fresh, params=params, ema=ema)
