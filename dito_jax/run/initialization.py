"""The state that a new run begins with: random, or what another run has learned."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from dito_jax.config import TrainConfig
from dito_jax.errors import UserError
from dito_jax.models.fine_tuning import check_start, started
from dito_jax.privacy.ledger import same_data
from dito_jax.run.saved_run import opened, restored, sampled_ema
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.program import Program
from dito_jax.training.state import TrainState, warm_started


def initial_state(config: TrainConfig, program: Program, mesh: jax.sharding.Mesh) -> TrainState:
    """Step 0 of a new run. One that starts from another begins with the average that the other is sampled from.

    Raises:
      UserError: there is no such run, its model cannot become this one, or this run is private, and the other has seen
        its data without privacy, or by the budget of another name.
    """
    state = program.init()
    if config.init_from is None:
        return state
    run, of_start = opened(config.init_from)
    check_start(of_start.model, config.model)
    if config.privacy.epsilon is not None:
        _check_ancestors(config)
    _, trained, _ = restored(run, of_start, mesh)
    average = sampled_ema(trained, of_start)
    return warm_started(started(of_start.model, average, config.model, state.params), state, program.state)


def ancestors(start: str | None) -> Iterator[tuple[RunDirectory, TrainConfig]]:
    """The run that one starts from, the one that that starts from, ..., and their configs.

    Raises:
      UserError: one of them is not there.
    """
    while start is not None:
        run, config = opened(start)
        yield run, config
        start = config.init_from


def _check_ancestors(config: TrainConfig) -> None:
    """Raises UserError if a run on the way saw this one's data, and was not private or was charged elsewhere."""
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
