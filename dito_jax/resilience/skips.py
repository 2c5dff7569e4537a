"""skips.json: the examples that rollbacks skip, and rollbacks that were interrupted.

A rollback to step T is the event "rollback_begun", then an entry {"after": T, "examples": number, "because": reason} in
skips.json, then the renaming of the checkpoints after T, and at last the event "rollback". A run that is killed in
between finishes the rollback when it starts again. A skips.json that cannot be parsed is rebuilt from the events.
Version 0.2.0 counted "batches" instead of "examples".
"""

import json
from typing import Any

from dito_jax.checkpointing.checkpoint import Checkpoints
from dito_jax.distributed import agree
from dito_jax.errors import UserError
from dito_jax.telemetry.events import Events, read_events
from dito_jax.telemetry.run_directory import RunDirectory


def skips(run: RunDirectory) -> list[dict[str, Any]]:
    """The skipped examples of a run: [{"after": step, "examples": number, "because": reason}].

    Raises:
      UserError: the file cannot be parsed, and the event log is missing, so that it cannot be rebuilt.
    """
    found = _parsed(run)
    return _of_events(run) if found is None else found


def roll_back_to(
    run: RunDirectory,
    checkpoints: Checkpoints,
    events: Events,
    *,
    number: int,
    target: int,
    examples: int,
    because: str,
) -> None:
    """Records that the run goes back from step `number` to `target`, past so many examples that it took since; sets the
    checkpoints after `target` aside.

    A collective. A run that is killed during it takes the same steps and examples when it starts again.
    """
    events.record("rollback_begun", step=number, to=target, examples=examples, because=because)
    agree(True)  # barrier: process 0 has written the event before any process reads it
    finish_rollback(run, checkpoints, events)


def finish_rollback(run: RunDirectory, checkpoints: Checkpoints, events: Events) -> None:
    """Finishes a rollback that has begun, if there is one; rewrites a skips.json that cannot be parsed.

    A collective, also called at the start of a run, before its state is restored.
    """
    torn, entries, begun = _parsed(run) is None, skips(run), _begun(run)
    agree(True)  # barrier: all processes have read the files before one writes them
    if torn:
        events.record(
            "skips_rebuilt",
            f"{run.skips}: missing or torn: rebuilt from {run.events.name} ({len(entries)} rollbacks).",
        )
    if begun is not None:
        entry = {"after": begun["to"]} | _amount(begun) | {"because": begun["because"]}
        entries = entries if entry in entries else _added(entries, entry)
    if torn or begun is not None:
        run.write_json(run.skips.name, entries)
        agree(True)  # barrier: skips.json is written before any process reads it
    if begun is not None:
        for step in [step for step in checkpoints.steps() if step > begun["to"]]:
            checkpoints.set_aside(step, "abandoned")
        events.record("rollback", begun["because"], step=begun["step"], to=begun["to"], **_amount(begun))
        agree(True)  # barrier: the event is written before any process reads it


def _begun(run: RunDirectory) -> dict[str, Any] | None:
    """The event of a rollback that has begun and is not finished."""
    last = read_events(run, "rollback_begun", "rollback", step=int, to=int)[-1:]
    return last[0] if last and last[0]["event"] == "rollback_begun" and "because" in last[0] else None


def _parsed(run: RunDirectory) -> list[dict[str, Any]] | None:
    """The entries of skips.json; none if there is no file, unless the events have rollbacks; None if it is torn."""
    try:
        found = json.loads(run.skips.read_text())
    except FileNotFoundError:
        return None if read_events(run, "rollback") else []
    except ValueError:
        return None
    whole = isinstance(found, list) and all(isinstance(entry, dict) and _whole(entry) for entry in found)
    return found if whole else None


def _whole(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("after"), int) and len(_amount(entry)) > 0


def _amount(row: dict[str, Any]) -> dict[str, int]:
    """How much was skipped: {"examples": number}, or {"batches": number} in a row of version 0.2.0."""
    return {name: row[name] for name in ("examples", "batches") if isinstance(row.get(name), int)}


def _of_events(run: RunDirectory) -> list[dict[str, Any]]:
    """The entries as the events tell them. A rollback is an event before the run goes on from it."""
    if not read_events(run):
        raise UserError(
            f"{run.skips}: cannot be parsed, and {run.events.name}, from which it could be rebuilt, has no events: "
            "restore one of them from a copy, or use another --run-dir."
        )
    entries: list[dict[str, Any]] = []
    for row in read_events(run, "rollback", to=int):
        entries = _added(entries, {"after": row["to"]} | _amount(row) | {"because": row["said"]})
    return entries


def _added(entries: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries after one more rollback; those of later steps are of the course that the run has left."""
    return [*(each for each in entries if each["after"] <= entry["after"]), entry]
