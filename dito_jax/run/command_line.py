"""What every command shares: the platform, the arguments of a run, and one line for the user's mistakes."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from flax import nnx

from dito_jax import config as configs
from dito_jax.checkpointing.checkpoint import Checkpoints
from dito_jax.config import TrainConfig
from dito_jax.data import Source
from dito_jax.distributed import count, index, leave
from dito_jax.errors import CRASHED, INTERRUPTED, PREEMPTED, USER_MISTAKE, Preempted, UserError
from dito_jax.privacy.card import card
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.program import Program, make_program
from dito_jax.training.state import TrainState
from kernels_pallas import backend


def run[Arguments](
    parse: Callable[[], Arguments],
    execute: Callable[[Arguments], None],
    *,
    computes: Callable[[Arguments], bool] = lambda _: True,
) -> None:
    """Runs a command; a UserError, or a full disk, ends it with one line and exit code 2.

    A mistake in the arguments is told before anything is said of devices; nothing is, where it does not compute.
    """
    try:
        arguments = parse()
        if computes(arguments):
            backend.settle_platform()
        execute(arguments)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        _end(USER_MISTAKE)
    except Preempted as stop:
        print(f"{Path(sys.argv[0]).name}: {stop}", file=sys.stderr)
        _end(PREEMPTED)
    except KeyboardInterrupt:
        _end(INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            print(f"{Path(sys.argv[0]).name}: {error.filename}: {error.strerror}.", file=sys.stderr)
            _end(USER_MISTAKE)
        if count() == 1:
            raise
        traceback.print_exc()
        _end(CRASHED)


def say(text: str) -> None:
    """A line on stderr, by one process of several."""
    if index() == 0:
        print(text, file=sys.stderr)


def _end(code: int) -> NoReturn:
    """Ends the process; of several, without waiting for those that wait for this one."""
    if count() > 1:
        leave(code)
    sys.exit(code)


def train_arguments(arguments: Sequence[str]) -> tuple[TrainConfig, RunDirectory]:
    """`CONFIG [--run-dir DIR] [--field value ...]`; --help lists every field with its value and exits."""
    if not arguments or arguments[0] in ("-h", "--help"):
        raise UserError("usage: train.py CONFIG [--run-dir DIR] [--field value ...], e.g. train.py configs/digits.py")
    path, *rest = arguments
    config = configs.load(path)
    if "--help" in rest or "-h" in rest:
        print(f"{path}: every option, and its value in this config\n\n  --run-dir runs/{Path(path).stem}")
        print("\n".join(f"  --{name} {value}" for name, value in configs.values(config).items()))
        sys.exit(0)
    directory, rest = _run_dir(rest, default=f"runs/{Path(path).stem}")
    return configs.override(config, rest), RunDirectory(directory)


def check_data(config: TrainConfig, source: Source) -> None:
    """Raises UserError if the data are not what the model takes."""
    model = config.model
    if tuple(source.image_shape) != tuple(model.image_shape):
        raise UserError(
            f"model.image_shape is {model.image_shape}, the data's images are {tuple(source.image_shape)} (h, w, c): "
            "change one of them."
        )
    if source.num_classes > model.num_classes:
        raise UserError(
            f"model.num_classes is {model.num_classes}, the data have {source.num_classes}: raise it to at least that."
        )


def opened(path: str) -> tuple[RunDirectory, TrainConfig]:
    """A run that there is, and its config."""
    run = RunDirectory(path)
    if not run.config.is_file():
        raise UserError(f"{path}: no run here (no {run.config.name}); give a directory that train.py made.")
    return run, configs.from_json(run.config.read_text())


def restored(
    run: RunDirectory, config: TrainConfig, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[Program, TrainState, int]:
    """A run's checkpoint, the last good one if `step` is None, on this mesh."""
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    program = make_program(config.model, config.loss, config.optimizer, config.train, mesh, config.guard)
    if step is not None:
        return program, checkpoints.restore(step, program.state), step
    found = checkpoints.restore_newest(program.state, lambda step, error: say(f"{error} Left where it is."))
    if found is None:
        raise UserError(f"{run.checkpoints}: no checkpoint yet; wait for one, or train further.")
    step, state = found
    return program, state, step


def restored_here(run: RunDirectory, config: TrainConfig, step: int | None = None) -> tuple[Program, TrainState, int]:
    """The same on this machine's own device, whatever the run was trained on."""
    return restored(run, config, make_mesh(MeshConfig(), np.array(jax.devices()[:1])), step)


def sampled_ema(state: TrainState, config: TrainConfig) -> nnx.State:
    """The average of the parameters that images are drawn from."""
    return state.ema[str(config.sample.ema_decay or config.train.ema_decays[0])]


def card_of(run: RunDirectory, config: TrainConfig) -> dict[str, Any]:
    """What was promised of a private run."""
    return card(
        run, config.privacy, init_from=config.init_from, trainable=config.train.trainable, canaries=config.canaries
    )


def cache_directory() -> str:
    """Where compiled programs are kept between runs: $DITO_CACHE, or ~/.cache/dito_jax."""
    return os.environ.get("DITO_CACHE") or str(Path.home() / ".cache" / "dito_jax")


def _run_dir(arguments: Sequence[str], *, default: str) -> tuple[str, list[str]]:
    """Takes --run-dir out of the arguments."""
    rest, directory, tokens = [], default, iter(arguments)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name not in ("--run-dir", "--run_dir"):
            rest.append(token)
        elif not (directory := value if equals else next(tokens, "")):
            raise UserError("--run-dir: got nothing; wanted a directory.")
    return directory, rest
