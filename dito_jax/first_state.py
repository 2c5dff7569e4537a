"""The state that a new run begins with: random, or what another run has learned."""

import jax

from dito_jax.command_line import opened, restored, sampled_average
from dito_jax.config import TrainConfig
from dito_jax.errors import UserError
from dito_jax.models.fine_tuning import check_start, started
from dito_jax.training.program import Program
from dito_jax.training.state import TrainState, begun_with


def first_state(config: TrainConfig, program: Program, mesh: jax.sharding.Mesh) -> TrainState:
    """Step 0 of a new run. One that starts from another begins with the average that the other is sampled from.

    Raises:
      UserError: there is no such run, its model cannot become this one, or this run is private, and the other has seen
        its data without privacy.
    """
    state = program.init()
    if config.start_from is None:
        return state
    run, of_start = opened(config.start_from)
    check_start(of_start.model, config.model)
    if config.privacy.epsilon is not None:
        _check_ancestors(config, config.start_from)
    _, trained, _ = restored(run, of_start, mesh)
    average = sampled_average(trained, of_start)
    return begun_with(started(of_start.model, average, config.model, state.params), state, program.state)


def _check_ancestors(config: TrainConfig, start: str | None) -> None:
    """Raises UserError if a run on the way saw this one's data, and was not private."""
    while start is not None:
        _, of_start = opened(start)
        if of_start.privacy.epsilon is None and of_start.data == config.data:
            raise UserError(
                f"start_from {start}: that run saw the same data without privacy, and this one would publish what it "
                "learned. Begin with a run on public data, or a private one."
            )
        start = of_start.start_from
