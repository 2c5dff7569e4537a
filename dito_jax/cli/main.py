"""The `dito` command: each verb is a file of this folder, imported when it is used, so that help is quick."""

import argparse
import importlib
import sys

from dito_jax.cli.arguments import MODULES, parsed
from dito_jax.run import command_line


WITHOUT_DEVICES = {"supervise", "configs", "data", "completion", "goodput"}  # supervise: its processes compute, not it


def main() -> None:
    """The entry point."""
    if sys.argv[1:2] == ["train"]:
        from dito_jax.cli.train import run_train

        run_train(sys.argv[2:])
        return
    command_line.run(
        lambda: parsed(sys.argv[1:]), _execute, computes=lambda options: options.verb not in WITHOUT_DEVICES
    )


def _execute(options: argparse.Namespace) -> None:
    importlib.import_module(f"dito_jax.cli.{MODULES[options.verb]}").main(options)


if __name__ == "__main__":
    main()
