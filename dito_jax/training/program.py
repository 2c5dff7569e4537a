"""The jitted init and train step of a run, with the shapes and shardings of the state and the batch.

Nothing is computed when a Program is made. `train.py` runs it; `dito hlo` compiles it ahead of time (AOT), for real
devices or compile-only ones.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dito_jax.diffusion.loss import LossConfig
from dito_jax.models.dit import DiTConfig
from dito_jax.sharding import shardings, spec
from dito_jax.training.health import GuardConfig
from dito_jax.training.optimizer import OptimizerConfig, make_optimizer
from dito_jax.training.state import TrainState, init_state, split_model
from dito_jax.training.step import ComputeDtype, Step, make_step
from dito_jax.training.trainable import Names, check_names


DEFAULT_GUARD = GuardConfig()


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length, batch size and precision of training."""

    steps: int
    """Number of training steps."""
    batch_size: int
    """Images per step over all devices (global batch size)."""
    gradient_accumulation_steps: int = 1
    """Number of parts that a batch is computed in, one after the other, to save memory."""
    trainable: Names = ()
    """Names of the parameters to train, e.g. attention or lora_a; the others are frozen; empty: train all."""
    compute_dtype: ComputeDtype = "bfloat16"
    """Dtype of the network's computation; parameters, loss and optimizer state stay float32."""
    ema_decays: tuple[float, ...] = (0.9999,)
    """Decay rates of the EMA parameters; one EMA copy is kept for each."""
    seed: int = 0
    """Seed of the initialization, the data order and all random draws of training."""
    log_every: int = 50
    """Log metrics every this many steps."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Jitted init and train step of a run, and the shapes and shardings of their arguments."""

    graph: nnx.GraphDef
    init: Callable[[], TrainState]  # jitted
    step: Any  # jitted, state donated: step(state, batch) -> (state, metrics)
    state: TrainState  # ShapeDtypeStructs with shardings; a checkpoint is restored into this structure
    batch: dict[str, jax.ShapeDtypeStruct]

    def share(self) -> tuple[int, int]:
        """(i, n): this process loads the i-th of n equal shares of a batch."""
        image = self.batch["image"]
        num = image.shape[0]
        indices = image.sharding.addressable_devices_indices_map(image.shape).values()
        pieces = {index[0].indices(num)[:2] for index in indices if index}
        start, stop = min(piece[0] for piece in pieces), max(piece[1] for piece in pieces)
        assert sum(b - a for a, b in pieces) == stop - start, (
            f"the rows of one process are not contiguous: {sorted(pieces)}"
        )
        return start // (stop - start), num // (stop - start)

    def place(self, share: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on its devices, as shards of the global batch."""
        return jax.tree.map(
            lambda leaf, rows: jax.make_array_from_process_local_data(leaf.sharding, rows), self.batch, share
        )


def make_program(
    model: DiTConfig,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    loop: LoopConfig,
    mesh: jax.sharding.Mesh,
    guard: GuardConfig = DEFAULT_GUARD,
) -> Program:
    """The Program for this model, loss and optimizer on this mesh; call it under `jax.set_mesh(mesh)`.

    Raises:
      UserError: a name in `loop.trainable` is not that of a parameter.
    """
    update: optax.GradientTransformation = make_optimizer(optimizer, loop.steps)
    graph, _ = split_model(model)
    step = make_step(
        graph,
        update,
        loss,
        null_label=model.num_classes,
        decays=loop.ema_decays,
        compute_dtype=loop.compute_dtype,
        gradient_accumulation_steps=loop.gradient_accumulation_steps,
        rebalance=model.rebalance,
        spike_deviations=guard.spike_deviations,
        trainable=loop.trainable,
    )
    by_example = jax.NamedSharding(mesh, spec("B", mesh))
    batch = {
        "image": jax.ShapeDtypeStruct((loop.batch_size, *model.image_shape), jnp.float32, sharding=by_example),
        "label": jax.ShapeDtypeStruct((loop.batch_size,), jnp.int32, sharding=by_example),
    }
    return assemble(model, update, loop, mesh, guard, step, batch)


def assemble(
    model: DiTConfig,
    update: optax.GradientTransformation,
    loop: LoopConfig,
    mesh: jax.sharding.Mesh,
    guard: GuardConfig,
    step: Step,
    batch: dict[str, jax.ShapeDtypeStruct],
) -> Program:
    """The Program for a given step function, with the shapes and shardings of its batch.

    Raises:
      UserError: a name in `loop.trainable` is not that of a parameter.
    """
    graph, params = split_model(model)
    check_names(params, loop.trainable)

    def init() -> TrainState:
        return init_state(model, update, loop.ema_decays, loop.seed, guard.window, loop.trainable)

    shapes = jax.eval_shape(init)
    state_shardings = shardings(shapes, mesh)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, state_shardings
    )
    metrics = jax.NamedSharding(mesh, jax.P())
    return Program(
        graph=graph,
        init=jax.jit(init, out_shardings=state_shardings),
        step=jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, metrics)),
        state=state,
        batch=batch,
    )
