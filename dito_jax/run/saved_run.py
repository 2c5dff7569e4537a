"""A run directory read back: its config, and its state on a mesh."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from dito_jax import config as configs
from dito_jax.checkpointing.checkpoint import Checkpoints
from dito_jax.checkpointing.identity import owner_of
from dito_jax.config import TrainConfig
from dito_jax.errors import UserError
from dito_jax.run.command_line import say
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.telemetry.run_directory import FollowedDirectory, RunDirectory
from dito_jax.training.program import Program, make_program
from dito_jax.training.state import TrainState


def opened(path: str) -> tuple[RunDirectory, TrainConfig]:
    """A run directory and its config.

    Raises:
      UserError: `path` is no run directory, or its config.json cannot be read or describes no model.
    """
    run = RunDirectory(path)
    if not run.config.is_file():
        raise UserError(f"{path}: no run here (no {run.config.name}); give a directory that train.py made.")
    config = configs.from_json(run.config.read_text(errors="replace"))
    if problems := list(config.model.problems()):
        raise UserError(f"{run.config}: {'; '.join(problems)}: restore it from a copy.")
    return run, config


def checkpoints_of(run: RunDirectory, config: TrainConfig, **changes: Any) -> Checkpoints:
    """The checkpoints of a run, to be read; `changes` are those to config.checkpoint."""
    settings = dataclasses.replace(config.checkpoint, **changes)
    return Checkpoints(run.checkpoints, settings, owner=owner_of(FollowedDirectory(run.path)), tell=say)


def restored(
    run: RunDirectory, config: TrainConfig, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[Program, TrainState, int]:
    """A checkpoint of a run on this mesh: that of `step`, or the last good one if `step` is None.

    Raises:
      UserError: there is no such checkpoint.
    """
    checkpoints = checkpoints_of(run, config)
    program = make_program(config.model, config.loss, config.optimizer, config.train, mesh, config.guard)
    if step is not None:
        return program, checkpoints.restore(step, program.state), step
    found = checkpoints.restore_newest(program.state, lambda step, error: say(f"{error} Left where it is."))
    if found is None:
        raise UserError(f"{run.checkpoints}: no checkpoint yet; wait for one, or train further.")
    step, state = found
    return program, state, step


def restored_here(run: RunDirectory, config: TrainConfig, step: int | None = None) -> tuple[Program, TrainState, int]:
    """`restored` on the first device of this machine, whatever mesh the run was trained on."""
    return restored(run, config, make_mesh(MeshConfig(), np.array(jax.devices()[:1])), step)


def sampled_ema(state: TrainState, config: TrainConfig) -> nnx.State:
    """The EMA of the parameters that samples are drawn from: that of sample.ema_decay, or the first."""
    return state.ema[str(config.sample.ema_decay or config.train.ema_decays[0])]
