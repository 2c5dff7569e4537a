"""What every command shares: the platform, the arguments of a run, and one line for the user's mistakes."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dito_jax import config as configs
from dito_jax.config import TrainConfig
from dito_jax.data import Source
from dito_jax.errors import UserError
from dito_jax.training.run_directory import RunDirectory
from kernels_pallas import backend


USER_MISTAKE = 2


def run[Arguments](parse: Callable[[], Arguments], execute: Callable[[Arguments], None]) -> None:
    """Runs a command; a UserError, or a full disk, ends it with one line and exit code 2.

    A mistake in the arguments is told before anything is said of devices.
    """
    try:
        arguments = parse()
        backend.settle_platform()
        execute(arguments)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(USER_MISTAKE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"{Path(sys.argv[0]).name}: {error.filename}: {error.strerror}.", file=sys.stderr)
        sys.exit(USER_MISTAKE)
    except KeyboardInterrupt:
        sys.exit(130)


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
