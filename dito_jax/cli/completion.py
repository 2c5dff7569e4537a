"""`dito completion bash|zsh|fish`: a completion script of every verb, option and config field, written by tyro."""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import tyro

from dito_jax.bundled import built_in_configs
from dito_jax.cli.arguments import WITH_FIELDS, make_parser
from dito_jax.config import TrainConfig, load
from dito_jax.overrides import KINDS


def main(options: argparse.Namespace) -> None:
    """Prints the script: for `eval "$(dito completion bash)"`, or a file in the completion folder of the shell."""
    lines = {name: _line(name, parser) for name, parser in make_parser()[1].items()}
    tyro.extras.subcommand_cli_from_dict(
        lines, prog="dito", args=["--tyro-print-completion", options.shell], use_underscores=True,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )  # fmt: skip


def _line(verb: str, parser: argparse.ArgumentParser) -> type:
    """The options of a verb as a dataclass, which is what tyro reads."""
    fields = [_field(action) for action in _actions(parser)]
    if verb == "train":
        fields = [
            ("config", tyro.conf.Positional[_one_of(built_in_configs())], "digits"),
            ("run_dir", str, ""),
            *((section, _one_of(kinds), next(iter(kinds))) for section, kinds in KINDS.items()),
        ]
    if verb == "train" or verb in {name for name, _ in WITH_FIELDS}:
        fields.append(("fields", Annotated[TrainConfig, tyro.conf.arg(name="")], load("digits")))
    unique = {name: (name, kind, dataclasses.field(default_factory=lambda v=value: v)) for name, kind, value in fields}
    return dataclasses.make_dataclass(verb, unique.values())


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options of a parser and of those below it, but --help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield argparse.Action([], action.dest, choices=list(action.choices))
            for below in action.choices.values():
                yield from _actions(below)
        elif action.dest != "help":
            yield action


def _field(action: argparse.Action) -> tuple[str, Any, Any]:
    """Name, type and default of an option."""
    kind = _one_of(action.choices) if action.choices else str
    default = next(iter(action.choices)) if action.choices else ""
    if action.dest in ("config", "name"):
        kind, default = _one_of(built_in_configs()), "digits"
    if not action.option_strings:
        return action.dest, tyro.conf.Positional[kind], default
    name = action.option_strings[-1].lstrip("-").replace("-", "_")
    return action.dest, Annotated[kind, tyro.conf.arg(name=name)], default


def _one_of(names: Any) -> Any:
    return Literal[*names]
