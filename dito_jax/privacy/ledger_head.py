"""The last ledger entry of a run, kept in the run directory, and the check of a ledger against it and the run's plan.

Guarantees
  - After every charge RUN/ledger_head.json has the number and the hash of its entry. The hash chain ties all earlier
    entries of the ledger to this hash, so a ledger in which one of them was rewritten, removed or exchanged is refused.
  - The file has a fixed length and is overwritten in place: it never needs space on a full disk. If a crash of the
    machine loses the last writes, the file names an earlier entry, and the entries after it are not checked.
  - Runs of dito_jax 0.2 and earlier have no such file: their entries are checked up to the last start of the run.
  - Not covered: users who can write both the ledger and the run directory can change both.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from dito_jax.errors import UserError
from dito_jax.privacy.accounting import Release
from dito_jax.privacy.ledger import Ledger
from dito_jax.telemetry.run_directory import RunDirectory, explained


HEAD = "ledger_head.json"


def write_head(run: RunDirectory, ledger: Ledger) -> dict[str, Any]:
    """Notes the last entry of the ledger; returns what privacy.json keeps of it.

    Raises:
      UserError: the disk is full.
    """
    entry = {"number": ledger.number, "head": ledger.head}
    path = run.path / HEAD
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, json.dumps(entry).ljust(127).encode() + b"\n", 0)
        finally:
            os.close(descriptor)
    return entry | {"last_entry": HEAD}


def check_ledger(
    ledger: Ledger, run: RunDirectory, kept: Mapping[str, Any], release: Release, *, steps: int = 0
) -> None:
    """Checks a ledger against what a run keeps: privacy.json (`kept`), the last entry, its release and taken steps.

    Raises:
      UserError: the ledger was rewritten, truncated or exchanged, or it lacks a run that this one starts from.
    """
    start, name = kept.get("ledger"), kept["run"]
    if start is not None:
        _check_entry(ledger, start)
    if lost := [behind for behind in kept.get("starts_from", []) if not ledger.restarts(behind)]:
        raise UserError(
            f"{ledger.path}: it lacks run {lost[0][:8]}, which this run starts from and which used these data: "
            "use the ledger that has it (DITO_LEDGERS)."
        )
    if (charged := sum(ledger.spent(name).values())) < steps:
        raise UserError(
            f"{ledger.path}: {charged} steps of this run are charged, but it has taken {steps}: entries are "
            "missing at the end. Restore the ledger from a copy."
        )
    if start is not None and "last_entry" in start:
        _check_entry(ledger, _read_head(run))
    for found in (*ledger.starts(name), *ledger.spent(name)):
        if found != release:
            raise UserError(
                f"{ledger.path}: it has entries of this run with {_words(found)}, but the plan of {run.path} has "
                f"{_words(release)}: one of the two was rewritten. The spent privacy is unknown: restore both from "
                "copies."
            )


def _check_entry(ledger: Ledger, noted: Mapping[str, Any]) -> None:
    if not ledger.remembers(noted["number"], noted["head"]):
        raise UserError(
            f"{ledger.path}: entry {noted['number']} differs from the one that this run recorded: another file, "
            "rewritten or missing entries. The spent privacy is unknown: restore the ledger from a copy."
        )


def _read_head(run: RunDirectory) -> dict[str, Any]:
    path, text = run.path / HEAD, None
    try:
        while text != (text := path.read_bytes()):  # until it is not being overwritten
            pass
        noted = json.loads(text)
        return {"number": int(noted["number"]), "head": str(noted["head"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: it should have the last ledger entry of this run, and it is missing or damaged: restore the run "
            "directory from a copy."
        ) from error


def _words(release: Release) -> str:
    truncated = f", at most {release.max_batch} of {release.num_examples}" if release.max_batch is not None else ""
    return f"noise {release.noise_multiplier:g} and sampling probability {release.sampling_prob:g}{truncated}"
