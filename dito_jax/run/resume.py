"""What a start of a run is compared with: its earlier checkpoints, its length, and the data set of the last start."""

import json
from collections.abc import Callable
from typing import Any

from dito_jax.checkpointing.checkpoint import set_aside_steps
from dito_jax.data import Source
from dito_jax.data.fingerprint import fingerprint
from dito_jax.errors import UserError
from dito_jax.telemetry.events import Events, read_events
from dito_jax.telemetry.run_directory import RunDirectory


DATA = "data.json"  # the fingerprint of the training data
SAVED = "first_checkpoint"  # the event that the run has a checkpoint on disk


def check_first_step(run: RunDirectory, first: int | None, steps: int) -> None:
    """Checks that a run may begin after `first`, the step restored, or None, and train up to step `steps`.

    Raises:
      UserError: the run is longer already, or it has saved checkpoints, of which none is left to be restored.
    """
    if first is not None and first > steps:
        raise UserError(
            f"train.steps is {steps}, and {run.path} is trained up to step {first}: give a larger train.steps, or "
            "another --run-dir."
        )
    if first is None and (why := _lost(run)):
        raise UserError(
            f"{run.checkpoints}: no checkpoint is left to resume from, though {why}: bring one back, or start a new "
            "run with another --run-dir. Nothing was changed."
        )


def _lost(run: RunDirectory) -> str | None:
    """What shows that a run without a checkpoint had some; None for a run that had none yet."""
    if run.checkpoints.is_symlink() and not run.checkpoints.exists():
        return f"it is a link to {run.checkpoints.readlink()}, which is not there"
    if aside := set_aside_steps(run.checkpoints):
        return f"{aside[-1].name} was set aside (rename it to {int(aside[-1].name.split('.')[0])} to try it again)"
    if read_events(run, SAVED) or any(row["step"] for row in read_events(run, "start", step=int)):
        return f"{run.events.name} tells of one"
    return None


def recorder(run: RunDirectory, events: Events) -> Callable[[int], None]:
    """Call the result with each step that is on disk: the first one of the run is recorded, once."""
    known = bool(read_events(run, SAVED))

    def record(step: int) -> None:
        nonlocal known
        if not known:
            events.record(SAVED, step=step)
        known = True

    return record


def compare_data(run: RunDirectory, source: Source, events: Events) -> None:
    """Compares the fingerprint of the training data with that of the last start, and stores it; tells of a change."""
    now, before = fingerprint(source), _stored(run)
    if before is not None and before != now:
        events.record(
            "data_changed",
            f"the training data are not those of the last start: {_words(before)} then, {_words(now)} now. Their order "
            "changes with them, so examples of this epoch may be repeated or passed over.",
            before=before, now=now,
        )  # fmt: skip
    if before != now:
        run.write_json(DATA, now)


def _stored(run: RunDirectory) -> dict[str, Any] | None:
    try:
        stored = json.loads((run.path / DATA).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return stored if isinstance(stored, dict) and {"examples", "classes", "sha256"} <= stored.keys() else None


def _words(data: dict[str, Any]) -> str:
    return f"{data['examples']:,} examples of {data['classes']} classes ({data['sha256'][:8]})"
