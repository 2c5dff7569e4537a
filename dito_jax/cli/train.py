"""`dito train CONFIG`: the main of train.py, which ships in the package."""

import runpy
from collections.abc import Sequence

from dito_jax import bundled
from dito_jax.config import TrainConfig
from dito_jax.run import command_line
from dito_jax.run.arguments import train_arguments
from dito_jax.telemetry.run_directory import RunDirectory


def run_train(arguments: Sequence[str]) -> None:
    """Trains; a mistake in the arguments is reported before train.py and what it needs are imported."""

    def train(arguments: tuple[TrainConfig, RunDirectory]) -> None:
        runpy.run_path(str(bundled.TRAIN), run_name="train")["main"](arguments)

    command_line.run(lambda: train_arguments(arguments), train)
