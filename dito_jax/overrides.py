"""Config fields on the command line: `--train.steps 200 --mesh.fsdp=8 --data image-folder --data.path photos`.

Dashes in names may stand for underscores. Every mistake is one line that names what was probably meant.
"""

import contextlib
import dataclasses
import difflib
import io
import typing
from collections.abc import Sequence
from typing import Any

import tyro

from dito_jax.config import RENAMED, TrainConfig
from dito_jax.data import DigitsData, ImageFolderData, LatentsData, ParquetData, StrokesData, WebDatasetData
from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig


# The sections whose kind can be chosen, by `--data KIND` and `--model KIND`.
KINDS: dict[str, dict[str, type]] = {
    "data": {
        "digits": DigitsData, "strokes": StrokesData, "image-folder": ImageFolderData,
        "webdataset": WebDatasetData, "parquet": ParquetData, "latents": LatentsData,
    },
    "model": {"dit": DiTConfig, "moe-dit": MoEDiTConfig},
}  # fmt: skip
INFERRED = ("model.image_shape", "model.num_classes")  # what infer_from_data takes from the data
Groups = list[tuple[str, list[str]]]


def override(config: TrainConfig, arguments: Sequence[str]) -> TrainConfig:
    """`config` with ["--train.steps", "200", "--mesh.fsdp=8"] applied; types are those of the fields.

    Raises:
      UserError: an option does not exist, or its value is not of its type.
    """
    groups = _grouped(arguments)
    for name, values in groups:
        if name in KINDS:
            config = _of_kind(config, name, values, groups)
    for name, values in groups:
        if name not in KINDS:
            fields = leaves(config)
            if name not in fields:
                raise UserError(f"no option --{name}; {_hint(name, config)}")
            config = _replaced(config, name.split("."), _parsed(name, fields[name], values))
    set_here = [name for name, _ in groups if name in INFERRED]
    if config.infer_from_data and set_here:
        raise UserError(
            f"--{set_here[0]}: infer_from_data takes it from the data; add --infer_from_data False to set it yourself."
        )
    return config


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """The dotted name and the type of every field: {"train.steps": int, ...}."""
    found = {}
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = hints[field.name]
    return found


def kind_of(config: TrainConfig, section: str) -> str:
    """The kind of a section of KINDS: "digits" for a config whose data are DigitsData; of others the class's name."""
    cls = type(getattr(config, section))
    return next((name for name, known in KINDS[section].items() if known is cls), cls.__name__)


def _of_kind(config: TrainConfig, section: str, values: list[str], groups: Groups) -> TrainConfig:
    """`config` with a section of another kind; a model keeps the fields that both kinds have."""
    kinds = KINDS[section]
    kind = " ".join(values).replace("_", "-")
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(kinds)}."
        raise UserError(f"--{section}: got {kind or 'nothing'!r}; {hint}")
    if kind == kind_of(config, section):
        return config
    cls, before, given = kinds[kind], getattr(config, section), dict(groups)
    hints, start = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        name = f"{section}.{field.name}"
        if section == "model" and hasattr(before, field.name):
            start[field.name] = getattr(before, field.name)
        elif name in given:
            start[field.name] = _parsed(name, hints[field.name], given[name])
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"--{section} {kind}: give --{name} too ({_type_name(hints[field.name])}).")
    changes: dict[str, Any] = {section: cls(**start)}
    if section == "data" and not {"infer_from_data", *INFERRED} & set(given):
        changes["infer_from_data"] = True
    return dataclasses.replace(config, **changes)


def _hint(name: str, config: TrainConfig) -> str:
    """What may have been meant by an option that does not exist."""
    section, _, leaf = name.rpartition(".")
    kinds = KINDS.get(section, {})
    if has_it := [kind for kind, cls in kinds.items() if leaf in {field.name for field in dataclasses.fields(cls)}]:
        wanted = " or ".join(f"--{section} {kind}" for kind in has_it)
        return f"this config has --{section} {kind_of(config, section)}; {wanted} has this option."
    fields = leaves(config)
    leaf = next((names[leaf] for names in RENAMED.values() if leaf in names), leaf)
    near = difflib.get_close_matches(name, fields, n=1) or [
        field for field in fields if difflib.get_close_matches(leaf, [field.split(".")[-1]], n=1)
    ]
    return f"did you mean --{near[0]} ({near[0].split('.')[-1]})?" if near else "--help lists all."


def _grouped(arguments: Sequence[str]) -> Groups:
    """--a 1 --b.c=2 3 -> [("a", ["1"]), ("b.c", ["2", "3"])]; dashes in names may stand for underscores."""
    groups: Groups = []
    for token in arguments:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            groups.append((name.replace("-", "_"), [value] if equals else []))
        elif groups:
            groups[-1][1].append(token)
        else:
            raise UserError(f"unexpected {token!r}; options are --name value, with the dotted name of a config field.")
    return groups


def _parsed(name: str, kind: Any, tokens: list[str]) -> Any:
    """`tokens` as a value of type `kind`, read by tyro."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(kind, args=tokens)
    except SystemExit:
        raise UserError(f"--{name}: got {' '.join(tokens) or 'nothing'!r}; wanted {_type_name(kind)}.") from None


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    new = _replaced(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: new})
