"""Identity of a checkpoint: its step, its run and its config, in the record that the checksum covers.

The name of a directory can be changed, so a checkpoint is not taken for what its directory says. The random id of a run
is in RUN/run.json. It belongs to the directory, not to its path: a run that is copied or moved as a whole is the same
run. Two copies of a run that are both trained further are not told apart.
"""

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dito_jax.checkpointing.checksums import Damaged, read_record, saved_steps
from dito_jax.checkpointing.failures import CheckpointError, Tell, persistently
from dito_jax.telemetry.run_directory import RunDirectory


RUN = "run.json"


@dataclasses.dataclass(frozen=True)
class Owner:
    """The run that writes or reads checkpoints. What is None is neither recorded nor compared."""

    run: str | None = None  # the random id of the run
    config: str | None = None  # as JSON

    def identity(self, step: int) -> dict[str, Any]:
        """What the record of a checkpoint says of itself: {"step", "run", "config": SHA-256 of the config}."""
        return {"step": step, "run": self.run, "config": config_digest(self.config)}


NOBODY = Owner()


def owner_of(run: RunDirectory, config: str | None = None, *, tell: Tell = lambda line: None) -> Owner:
    """The owner of a run directory's checkpoints; `config` is its config as JSON.

    A directory without a readable run.json has the id of its newest checkpoint. If that has none, a process that writes
    makes a new one, and `keep` writes it.
    """
    known = _read(run)
    if known is None and (known := _recorded(run.checkpoints, tell)):
        tell(f"{run.path / RUN}: missing or torn; the id of the run is taken from its newest checkpoint.")
    return Owner(known or (uuid.uuid4().hex if run.writes else None), config)


def keep(owner: Owner, run: RunDirectory) -> None:
    """Writes run.json, unless it has the id of `owner` already."""
    if _read(run) != owner.run:
        run.write_json(RUN, {"id": owner.run})


def config_digest(config: str | None) -> str | None:
    """SHA-256 in hex of a config as JSON, whatever its layout."""
    if config is None:
        return None
    return hashlib.sha256(json.dumps(json.loads(config), sort_keys=True).encode()).hexdigest()


def check_identity(path: Path, record: Mapping[str, Any], owner: Owner) -> str | None:
    """Compares the record of the checkpoint at `path` with its directory and with the run that reads it.

    Returns a line for the user if the checkpoint has no identity.

    Raises:
      CheckpointError: the checkpoint is of another step or of another run.
    """
    step, its = int(path.name), record.get("identity")
    if its is None:
        return f"{path}: of an older dito_jax, without the id of its run: taken as step {step} of this run."
    if its["step"] != step:
        raise _misnamed(path, its["step"])
    if None not in (its["run"], owner.run) and its["run"] != owner.run:
        raise CheckpointError(
            f"{path}: a checkpoint of run {its['run'][:8]}, and this is run {owner.run[:8]} ({RUN}): move it away; to "  # pyright: ignore[reportOptionalSubscript]
            "start from the weights of another run, use --init_from with its directory."
        )
    return None


def config_change(path: Path, record: Mapping[str, Any], owner: Owner) -> str | None:
    """A line that names the fields of the config that have other values in this start of the run; None if none has."""
    its = (record.get("identity") or {}).get("config")
    if None in (its, owner.config) or its == config_digest(owner.config):
        return None
    before, now = (_fields(json.loads(config)) for config in (record["metadata"]["config"], owner.config or "{}"))
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    return f"{path}: saved with other values of {', '.join(changed)}; those of this start apply."


def check_own_step(path: Path, state: Mapping[str, Any]) -> None:
    """Compares the step in the state, where it has one, with the directory.

    Raises:
      CheckpointError: it is another step.
    """
    own = state.get("step")
    if own is not None and own.shape == () and own.dtype.kind in "iu":
        step = int(np.asarray(own.addressable_data(0)))
        if step != int(path.name):
            raise _misnamed(path, step)


def _misnamed(path: Path, step: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds step {step}, not step {path.name}: rename it to {step}, or move it away if there is one."
    )


def _read(run: RunDirectory) -> str | None:
    def read() -> str | None:
        try:
            kept = json.loads((run.path / RUN).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return kept.get("id") if isinstance(kept, dict) and isinstance(kept.get("id"), str) else None

    return persistently(run.path / RUN, read, lambda line: None)


def _recorded(checkpoints: Path, tell: Tell) -> str | None:
    """The id in the newest checkpoint that has one."""
    names = persistently(checkpoints, lambda: saved_steps(checkpoints), tell)
    for step in (checkpoints / str(name) for name in reversed(names)):
        try:
            its = persistently(step, lambda: read_record(step).get("identity"), tell)  # noqa: B023
        except Damaged:
            continue
        if its is not None and its["run"]:
            return its["run"]
    return None


def _fields(config: Any, name: str = "") -> dict[str, Any]:
    """A nested config as {"train.steps": 40}."""
    if not isinstance(config, dict):
        return {name: config}
    parts = [_fields(value, f"{name}.{key}" if name else key) for key, value in config.items()]
    return {key: value for part in parts for key, value in part.items()}
