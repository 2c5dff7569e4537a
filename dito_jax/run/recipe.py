"""What a run trains with, private or not: its data, its compiled program, and the stream of its batches."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dito_jax.config import TrainConfig
from dito_jax.data import DataError, Source, batches, notes
from dito_jax.errors import UserError
from dito_jax.privacy.canaries import planted
from dito_jax.privacy.gradient_check import check_gradients
from dito_jax.privacy.program import make_private_program
from dito_jax.privacy.run import PLAN, PrivateRun, check_history, max_batch, trained
from dito_jax.privacy.settings import StepPlan
from dito_jax.resilience.data_position import DataPosition
from dito_jax.run.command_line import say
from dito_jax.run.initialization import ancestors, place
from dito_jax.sharding import batch_pieces
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.program import Program, make_program


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`batches_from(position)` yields this process's rows of the batches from a position in the data on.

    `validation` is None where the config asks for no evaluation and no validation loss, or the data have no such split.
    """

    source: Source
    validation: Source | None
    program: Program
    batches_from: Callable[[DataPosition], Iterator[Any]]


def make_recipe(config: TrainConfig, run: RunDirectory, mesh: jax.sharding.Mesh) -> Recipe:
    """The recipe of a config; call it under `jax.set_mesh(mesh)`.

    Raises:
      UserError: the data do not fit the model, or the privacy settings do not fit the data or the run.
    """
    check_history(run, private=config.privacy.epsilon is not None)
    source = config.data.open("train")
    check_data(config, source)
    for line in notes(source):
        say(line)
    # Opened before training, so that a validation split that is missing is reported now.
    validation = open_validation(config)
    source = planted(source, config.canaries, run) if config.canaries else source
    common = (config.model, config.loss, config.optimizer, config.train, mesh, config.guard)
    if config.privacy.epsilon is not None:
        multiple = batch_pieces(mesh.shape) * config.train.gradient_accumulation_steps
        private = PrivateRun(
            config.privacy, config.train, source, run,
            multiple=multiple, data=place(config.data), starts_from=_private_ancestors(config, run),
        )  # fmt: skip
        program = make_private_program(*common, config.privacy, private.plan)
        check_gradients(config.model, config.loss, config.train, mesh, config.privacy)
        return Recipe(
            source, validation, program, lambda position: private.batches_after(position.step, *program.share())
        )
    program = make_program(*common)
    share, shares = program.share()

    def stretch(first_example: int, number: int | None) -> Iterator[Any]:
        stream = batches(
            source, batch_size=config.train.batch_size, seed=config.train.seed, first_example=first_example,
            process_index=share, process_count=shares,
        )  # fmt: skip
        return stream if number is None else itertools.islice(stream, number)

    def batches_from(position: DataPosition) -> Iterator[Any]:
        first, *later = position.stretches()
        opened = stretch(*first)
        further = itertools.chain.from_iterable(stretch(*each) for each in later)
        return itertools.chain(opened, further) if later else opened

    return Recipe(source, validation, program, batches_from)


def open_validation(config: TrainConfig) -> Source | None:
    """The validation split, if the config asks for an evaluation or a validation loss.

    A split that is missing is no error if only the validation loss needs it: one line says so.

    Raises:
      UserError: the evaluation needs the split, and it cannot be opened.
    """
    if config.evaluation.num_samples:
        return config.data.open("validation")
    if config.monitoring.validation_every:
        try:
            return config.data.open("validation")
        except DataError as error:
            say(f"no validation loss: {error}")
    return None


def _private_ancestors(config: TrainConfig, run: RunDirectory) -> list[str]:
    """The names of the private runs on the same data set in the chain of warm starts; none for a resumed run.

    Raises:
      UserError: one of them has no plan file, which holds its name.
    """
    kept = run.path / PLAN
    if trained(run) and kept.exists() and "starts_from" in json.loads(kept.read_text()):
        return []
    names = []
    for ancestor, its in ancestors(config.init_from):
        if its.privacy.epsilon is not None and its.privacy.dataset == config.privacy.dataset:
            if not (plan := ancestor.path / PLAN).exists():
                raise UserError(f"init_from {ancestor.path}: a private run without its {PLAN}; restore that.")
            names.append(json.loads(plan.read_text())["run"])
    return names


def check_data(config: TrainConfig, source: Source) -> None:
    """Raises UserError if the data are not what the model takes."""
    model = config.model
    if tuple(source.image_shape) != tuple(model.image_shape):
        raise UserError(
            f"model.image_shape is {model.image_shape}, the data's images are {tuple(source.image_shape)} (h, w, c): "
            "change one of them, or add --infer_from_data True."
        )
    if source.num_classes > model.num_classes:
        raise UserError(
            f"model.num_classes is {model.num_classes}, the data have {source.num_classes}: raise it to at least that, "
            "or add --infer_from_data True."
        )


def planned_program(config: TrainConfig, mesh: jax.sharding.Mesh, num_units: int | None = None) -> Program:
    """The program of a config without its data; a private batch has the padding of a data set of `num_units` units.

    Without a number, the data set is taken to be 1,000 times the batch: a larger one needs hardly more padding.
    """
    common = (config.model, config.loss, config.optimizer, config.train, mesh, config.guard)
    if config.privacy.epsilon is None:
        return make_program(*common)
    multiple = batch_pieces(mesh.shape) * config.train.gradient_accumulation_steps
    units = num_units or 1000 * config.train.batch_size
    rows = max_batch(config.privacy, config.train, units, multiple)
    plan = StepPlan(1.0, config.train.batch_size / units, units, rows)
    return make_private_program(*common, config.privacy, plan)
