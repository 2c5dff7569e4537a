"""The monitor of a run: its validation loss and sample grids, as the config asks for."""

from collections.abc import Callable

from dito_jax.config import TrainConfig
from dito_jax.evaluation.monitoring import Monitor
from dito_jax.evaluation.sample import make_batch_sampler
from dito_jax.evaluation.validation_loss import make_validation_loss
from dito_jax.run.command_line import say
from dito_jax.run.recipe import Recipe
from dito_jax.telemetry.progress import MakeMeter
from dito_jax.telemetry.run_directory import RunDirectory


def make_monitor(
    config: TrainConfig, run: RunDirectory, recipe: Recipe, meter: MakeMeter, interrupted: Callable[[], bool]
) -> Monitor:
    """The monitor of a run; nothing is compiled before its first use."""
    graph, wanted, validation = recipe.program.graph, config.monitoring, None
    users = config.privacy.epsilon is not None and config.privacy.images_per_user is not None
    if wanted.validation_every and users:
        say("no validation loss: held-out images belong to the users whose data are private, and it has no noise.")
    elif wanted.validation_every and recipe.validation is not None:
        validation = make_validation_loss(
            graph, config.model, config.loss, recipe.validation,
            num_examples=wanted.validation_examples, num_bins=wanted.timestep_bins,
            batch_size=config.sample.batch_size, seed=config.train.seed,
        )  # fmt: skip
    draw = make_batch_sampler(graph, config.model, config.sample, config.loss.prediction)
    return Monitor(wanted, run, draw, validation, config.model.num_classes, config.train.seed, meter, interrupted)
