"""The initial state of a run: random, or a warm start from another run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from dito_jax.config import TrainConfig
from dito_jax.errors import UserError
from dito_jax.models.fine_tuning import changes, check_start, check_trained, started
from dito_jax.privacy.ledger import same_data
from dito_jax.run.command_line import say
from dito_jax.run.saved_run import opened, restored, sampled_ema
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.program import Program
from dito_jax.training.state import TrainState, warm_started


def initial_state(config: TrainConfig, program: Program, mesh: jax.sharding.Mesh) -> TrainState:
    """The state at step 0. A warm start takes the EMA parameters that the other run is sampled from.

    One line says what differs: another number of classes, another image size.

    Raises:
      UserError: there is no such run, its model does not fit this one, a new class embedding is not trained, or this
        run is private and the other one was trained on its data without privacy, or under another privacy budget.
    """
    state = program.init()
    if config.init_from is None:
        return state
    run, of_start = opened(config.init_from)
    check_start(of_start.model, config.model)
    check_trained(of_start.model, config.model, config.train.trainable)
    if config.privacy.epsilon is not None:
        _check_ancestors(config)
    _, trained, _ = restored(run, of_start, mesh)
    average = sampled_ema(trained, of_start)
    if differs := changes(of_start.model, config.model):
        say(f"init_from {run.path}: {differs}.")
    return warm_started(started(of_start.model, average, config.model, state.params), state, program.state)


def ancestors(start: str | None) -> Iterator[tuple[RunDirectory, TrainConfig]]:
    """The runs of a chain of warm starts, nearest first, and their configs.

    Raises:
      UserError: one of them is not there, or is its own ancestor.
    """
    seen = set[Path]()
    while start is not None:
        run, config = opened(start)
        if (here := run.path.resolve()) in seen:
            raise UserError(f"init_from {start}: a run that starts from itself (init_from in config.json): correct it.")
        seen.add(here)
        yield run, config
        start = config.init_from


def _check_ancestors(config: TrainConfig) -> None:
    """Raises UserError if an ancestor was trained on this run's data without privacy or under another budget."""
    for run, before in ancestors(config.init_from):
        if not same_data(place(before.data), place(config.data)):
            continue
        if before.privacy.epsilon is None:
            raise UserError(
                f"init_from {run.path}: that run saw the same data without privacy, and this one would publish what "
                "it learned. Begin with a run on public data, or a private one."
            )
        if before.privacy.dataset != config.privacy.dataset:
            raise UserError(
                f"init_from {run.path}: that run saw the same data, and was charged to {before.privacy.dataset!r}, "
                f"not to {config.privacy.dataset!r}: one data set has one budget. Set privacy.dataset to that."
            )


def place(data: Any) -> str:
    """What tells a config's data from others, however they are read: the path, up to what is not plain; else all."""
    if not getattr(data, "path", None):
        return repr(data)
    plain = re.split(r"[{*?\[]", data.path)[0]
    whole = plain == data.path or plain.endswith("/")
    return str((Path(plain) if whole else Path(plain).parent).expanduser().resolve())
