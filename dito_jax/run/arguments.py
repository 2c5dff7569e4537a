"""The command line of a training run: `CONFIG [--run-dir DIR] [--field value ...]`."""

import signal
import sys
from collections.abc import Sequence

from dito_jax import bundled, config as configs, overrides
from dito_jax.config import TrainConfig
from dito_jax.errors import UserError
from dito_jax.run.command_line import program
from dito_jax.run.help import print_config_help, train_help
from dito_jax.telemetry.run_directory import RunDirectory


HELP = ("-h", "--help")


def train_arguments(arguments: Sequence[str]) -> tuple[TrainConfig, RunDirectory]:
    """The config and the run directory that a command line asks for; --help prints every field and exits.

    Raises:
      UserError: no config is named, or an option or its value is wrong.
    """
    command = "train.py" if program() == "train.py" else "dito train"
    if not arguments:
        raise UserError(f"usage: {command} CONFIG [--run-dir DIR] [--field value ...]; `{command} --help` says more.")
    if set(HELP) & set(arguments):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a traceback
    if arguments[0] in HELP:
        print(train_help(command))
        sys.exit(0)
    name, *rest = arguments
    path = bundled.config_path(name)
    config = configs.load(path)
    if set(HELP) & set(rest):
        asked = [word for word in rest if word not in HELP]
        chosen, run = _overridden(config, asked, path.stem)
        print_config_help(f"{command} {name}", chosen, str(run.path))
    return _overridden(config, rest, path.stem)


def _overridden(config: TrainConfig, arguments: Sequence[str], stem: str) -> tuple[TrainConfig, RunDirectory]:
    """Takes --run-dir out of the arguments; the others are fields."""
    rest, directory, tokens = [], f"runs/{stem}", iter(arguments)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name not in ("--run-dir", "--run_dir"):
            rest.append(token)
        elif not (directory := value if equals else next(tokens, "")):
            raise UserError("--run-dir: got nothing; wanted a directory.")
    return overrides.override(config, rest), RunDirectory(directory)
