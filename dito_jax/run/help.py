"""What `dito train --help` and `dito train CONFIG --help` print; field by field it is tyro's."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from dito_jax.bundled import built_in_configs, summary
from dito_jax.config import TrainConfig
from dito_jax.overrides import KINDS, kind_of


USAGE = "CONFIG [--run-dir DIR] [--data KIND] [--model KIND] [--section.field value ...]"


def train_help(command: str) -> str:
    """The usage, and the built-in configs."""
    known = built_in_configs()
    width = max(map(len, known))
    return "\n".join(
        [
            f"usage: {command} {USAGE}",
            "",
            "Trains a diffusion transformer and writes everything about the run to the run directory. The same command",
            "again resumes the run from its last checkpoint. CONFIG is a Python file or a built-in config:",
            "",
            *(f"  {name:{width}}  {summary(path)}" for name, path in known.items()),
            "",
            f"`{command} CONFIG --help` prints every field with its type, value and meaning.",
        ]
    )


def print_config_help(command: str, config: TrainConfig, run_dir: str) -> None:
    """Prints every option with its type, its choices, its meaning and its value in this config, by section; exits."""
    here = {section: kind_of(config, section) for section in KINDS}
    own = [
        _option("run_dir", str, run_dir, "Where the run is written; a run that is there is resumed."),
        _option(
            "data",
            Literal[*KINDS["data"], here["data"]],
            here["data"],
            "Kind of data set; its own fields are listed below.",
        ),
        _option(
            "model",
            Literal[*KINDS["model"], here["model"]],
            here["model"],
            "Kind of model; its own fields are listed below.",
        ),
    ]
    run = dataclasses.make_dataclass("Run", own)
    unprefixed = tyro.conf.arg(name="")
    line = dataclasses.make_dataclass(
        "Line", [("run", Annotated[run, unprefixed]), ("config", Annotated[TrainConfig, unprefixed])]
    )
    tyro.cli(
        line, prog=command, args=["--help"], use_underscores=True, default=line(run(), config),
        description="Options of the run, then every field of the config with its value here.",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )  # fmt: skip


def _option(name: str, kind: Any, value: Any, meaning: str) -> tuple[str, Any, Any]:
    return name, Annotated[kind, tyro.conf.arg(help=meaning)], dataclasses.field(default=value)
