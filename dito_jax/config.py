"""One run's configuration: frozen dataclasses, each defined beside what it configures, joined here.

A config file is Python, with a function `config() -> TrainConfig`. A command line may change any field by its dotted
name (overrides.py): `dito train digits --train.steps 200`. Every mistake is one line and exit code 2.
"""

import dataclasses
import importlib.util
import json
import typing
from pathlib import Path
from typing import Any

from dito_jax.bundled import config_path
from dito_jax.checkpointing.retention import CheckpointConfig
from dito_jax.data import DigitsData, ImageFolderData, LatentsData, ParquetData, StrokesData, WebDatasetData
from dito_jax.diffusion.loss import LossConfig
from dito_jax.errors import UserError
from dito_jax.evaluation.evaluate import EvaluationConfig
from dito_jax.evaluation.monitoring_config import MonitoringConfig
from dito_jax.evaluation.sample import SampleConfig
from dito_jax.models.dit import DiTConfig
from dito_jax.models.kernels import KernelsConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.privacy.coupling import private_rules
from dito_jax.privacy.settings import PrivacyConfig
from dito_jax.resilience.faults import FaultsConfig
from dito_jax.resilience.watchdog import WatchdogConfig
from dito_jax.sharding import MeshConfig, batch_pieces
from dito_jax.training.health import GuardConfig
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig


DataConfig = DigitsData | StrokesData | ImageFolderData | WebDatasetData | ParquetData | LatentsData


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a run is made of; each section is described where it is defined."""

    model: DiTConfig
    data: DataConfig
    train: LoopConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    faults: FaultsConfig = FaultsConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    sample: SampleConfig = SampleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    # Warm start: the run directory whose EMA parameters this run starts from. The number of classes and the image size
    # may differ. The experts of a MoE-DiT can start from the MLPs of a dense DiT (sparse upcycling).
    init_from: str | None = None
    # Number of canaries: random images, each added to the training data with probability 1/2, for `dito privacy audit`.
    canaries: int = 0
    # Take model.image_shape and model.num_classes from the training data when the run starts. config.json then holds
    # the values found.
    infer_from_data: bool = False


def load(config: str | Path) -> TrainConfig:
    """The TrainConfig of a config file, given as a path or as the name of a built-in config ("digits").

    Raises:
      UserError: there is no such config, or its file does not give a TrainConfig.
    """
    path = config_path(str(config))
    spec = importlib.util.spec_from_file_location("config_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = module.config()
    except Exception as error:  # whatever the user's own file does wrong
        raise UserError(f"{path}: {type(error).__name__}: {error}".replace("\n", " ")) from error
    if not isinstance(made, TrainConfig):
        raise UserError(f"{path}: config() returned {type(made).__name__}; wanted a dito_jax.config.TrainConfig.")
    return made


def resolved(config: TrainConfig) -> TrainConfig:
    """`config` with the model's image_shape and num_classes taken from the training data, if infer_from_data says so.

    Raises:
      UserError: the training data cannot be opened.
    """
    if not config.infer_from_data:
        return config
    source = config.data.open("train")
    model = dataclasses.replace(config.model, image_shape=tuple(source.image_shape), num_classes=source.num_classes)
    return dataclasses.replace(config, model=model, infer_from_data=False)


def values(config: Any, prefix: str = "") -> dict[str, Any]:
    """The dotted name and the value of every field: {"train.steps": 1500, ...}."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= (
            values(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else {prefix + field.name: value}
        )
    return found


def check(config: TrainConfig, num_devices: int) -> None:
    """Raises UserError, in one line, if the config is inconsistent or does not fit this many devices."""
    model, train, private = config.model, config.train, config.privacy.epsilon is not None
    axes = config.mesh.resolve(num_devices)
    part = batch_pieces(axes) * train.gradient_accumulation_steps
    pieces = "mesh.data x mesh.fsdp x mesh.expert x train.gradient_accumulation_steps"
    rules = {
        f"train.batch_size {train.batch_size} is not a multiple of {pieces} = {part}": (
            train.batch_size % part > 0 and not private  # which pads
        ),
        **model.run_rules(axes, images=train.batch_size // part),
        **(private_rules(model, config.privacy, config.checkpoint) if private else {}),
        **config.monitoring.problems(private=private),
        f"canaries {config.canaries} is negative": config.canaries < 0,
        "data.max_unreadable would put another image in the place of an unreadable one, which then counts twice: set "
        "it to 0 in a private run": private and getattr(config.data, "max_unreadable", 0) > 0,
        f"guard.check_replicas_every {config.guard.check_replicas_every} is negative": config.guard.check_replicas_every
        < 0,
        "canaries belong to no user: set canaries to 0, or privacy.images_per_user to None": (
            config.canaries > 0 and config.privacy.images_per_user is not None
        ),
        f"sample.ema_decay {config.sample.ema_decay} is not in train.ema_decays {train.ema_decays}": (
            config.sample.ema_decay not in (None, *train.ema_decays)
        ),
        "train.ema_decays is empty; samples need an EMA: give a decay, e.g. 0.999": not train.ema_decays,
        f"guard.burst {config.guard.burst} cannot come among guard.burst_window {config.guard.burst_window} steps": (
            config.guard.burst > config.guard.burst_window
        ),
        f"checkpoint.keep_every is {config.checkpoint.keep_every}; wanted a number of steps, or None": (
            config.checkpoint.keep_every is not None and config.checkpoint.keep_every < 1
        ),
        f"sample.guidance_scale {config.sample.guidance_scale} needs loss.class_dropout_prob > 0": (
            config.sample.guidance_scale != 1 and config.loss.class_dropout_prob == 0
        ),
    }
    for name in ("train.steps", "train.batch_size", "train.gradient_accumulation_steps", "train.log_every",
                 "checkpoint.every", "checkpoint.keep", "guard.window", "guard.burst", "sample.steps",
                 "sample.batch_size"):  # fmt: skip
        rules[f"{name} is {values(config)[name]}; it must be at least 1"] = values(config)[name] < 1
    problems = [f"model: {p}" for p in model.problems()] + [p for p, broken in rules.items() if broken]
    if problems:
        raise UserError("; ".join(problems) + ".")


def to_json(config: Any) -> str:
    """The config as JSON; `from_json` is its inverse."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {"kind": type(value).__name__} | {
                f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
            }
        return list(value) if isinstance(value, tuple) else value

    return json.dumps(plain(config), indent=2) + "\n"


def from_json(text: str) -> TrainConfig:
    """The config that `to_json` wrote.

    Raises:
      UserError: the text is not a config, is another version's, or has a value of another type than its field.
    """

    def built(node: Any) -> Any:
        if isinstance(node, list):
            return tuple(map(built, node))
        if not isinstance(node, dict):
            return node
        kind, fields = node["kind"], {name: built(value) for name, value in node.items() if name != "kind"}
        for old, new in RENAMED.get(kind, {}).items():
            if old in fields:
                fields[new] = fields.pop(old)
        hints = typing.get_type_hints(_CLASSES[kind])
        for name, value in fields.items():
            if name in hints and not _fits(value, hints[name]):
                raise TypeError(f"{kind}.{name} is {value!r}, not of type {hints[name]}")
        return _CLASSES[kind](**fields)

    try:
        config = built(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"config.json is not of this version of dito_jax: {str(error)[:200]}.") from error
    if not isinstance(config, TrainConfig):
        raise UserError(f"config.json holds {type(config).__name__}, not a TrainConfig: restore it from a copy.")
    return config


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type of a field: a class, a union, a literal, or a tuple."""
    if isinstance(kind, typing.TypeAliasType):
        return _fits(value, kind.__value__)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        kinds = parts[:1] * len(value) if isinstance(value, tuple) and parts[1:] == (...,) else parts
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if parts:
        return any(_fits(value, part) for part in parts)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


# Fields by the names that earlier versions wrote into config.json: class -> {old: new}.
RENAMED: dict[str, dict[str, str]] = {
    "TrainConfig": {"start_from": "init_from"},
    "LoopConfig": {"accumulation": "gradient_accumulation_steps"},
    "LossConfig": {"space": "loss_type", "times": "timestep_sampling", "label_dropout": "class_dropout_prob"},
    "SampleConfig": {"solver": "sampler"},
    "PrivacyConfig": {"draws": "noise_multiplicity"},
    "WatchdogConfig": {"other_seconds": "phase_timeout_seconds"},
    "GuardConfig": {"replicas_every": "check_replicas_every"},
}

_CLASSES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        TrainConfig, DiTConfig, MoEDiTConfig, KernelsConfig, LossConfig, OptimizerConfig, MeshConfig, LoopConfig,
        CheckpointConfig, GuardConfig, WatchdogConfig, FaultsConfig, PrivacyConfig, SampleConfig, EvaluationConfig,
        MonitoringConfig, DigitsData, StrokesData, ImageFolderData, WebDatasetData, ParquetData, LatentsData,
    )
}  # fmt: skip
