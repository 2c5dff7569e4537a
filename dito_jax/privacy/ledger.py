"""The privacy ledger of a data set: one file for all runs on it, in which each step is charged before it is taken.

Guarantees
  - A charge is on disk before `charge` returns, and the step is taken after that. The ledger may contain a step that a
    crash prevented, but never lacks one that was taken. A repeated step is charged again.
  - Entries form a SHA-256 hash chain: a changed, missing or moved line is an error that names the line. An incomplete
    last line after a crash belongs to a charge that never returned; it is removed, and an entry records that.
  - One `Ledger` object at a time writes the file, over all threads, processes and runs; each reads the charges of the
    others before its own. A file that was truncated or exchanged in the meantime is an error.
  - An entry with a schema version, kind or field that this version does not know is an error (ledger_file.py).
  - Not covered: users with write access can rewrite the file with a new chain. Only a run that has recorded an entry
    (`remembers`), or a copy, shows that. Steps taken by other programs are not charged.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dito_jax.errors import UserError
from dito_jax.privacy.accounting import Release
from dito_jax.privacy.budget import Budget, Plan, Spending
from dito_jax.privacy.ledger_file import SCHEMA, append_line, check_schema, content, exclusive


FIRST = "0" * 64


def ledger_path(dataset: str) -> Path:
    """$DITO_LEDGERS/<dataset>.jsonl, or ~/.local/share/dito_jax/ledgers/<dataset>.jsonl."""
    folder = Path(os.environ.get("DITO_LEDGERS") or Path.home() / ".local/share/dito_jax/ledgers")
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", dataset).strip("._") or "dataset"
    # A hash, so that names that differ only in replaced characters have different files.
    return (
        folder / f"{plain if plain == dataset else f'{plain}-{hashlib.sha256(dataset.encode()).hexdigest()[:8]}'}.jsonl"
    )


class Ledger:
    """The ledger of one data set."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: list[dict[str, Any]] = []  # all entries except charges
        self.head = FIRST  # hash of the last entry
        self.number = 0  # number of entries
        self._offset, self._last = 0, b""  # end of the last entry in the file, and its line
        self._spending = Spending()
        if path.exists():
            with self._locked():
                pass

    @property
    def budget(self) -> Budget | None:
        """The last budget that was set; None if none was set."""
        found = [entry for entry in self.entries if entry["kind"] == "budget"]
        return Budget(**found[-1]["payload"]) if found else None

    def spent(self, run: str | None = None) -> Mapping[Release, int]:
        """Number of charged steps by release, of all runs or of one run."""
        return dict(self._spending.total if run is None else self._spending.by_run.get(run, {}))

    def runs(self) -> list[str]:
        """Names of all started runs, in order."""
        return list(dict.fromkeys(entry["run"] for entry in self.entries if entry["kind"] == "start"))

    def starts(self, run: str) -> list[Release]:
        """The planned release of each start of a run."""
        return [
            Release(**entry["payload"]["release"])
            for entry in self.entries
            if entry["kind"] == "start" and entry["run"] == run
        ]

    def restarts(self, run: str) -> int:
        """Number of starts of a run."""
        return len(self.starts(run))

    def set_budget(self, budget: Budget) -> None:
        """Sets or changes the budget; earlier budgets stay in the ledger."""
        with self._locked() as append:
            append("budget", "", dataclasses.asdict(budget))

    def start(self, run: str, release: Release, steps: int, **notes: Any) -> int:
        """Records the start of a run that plans `steps` steps; returns the index of this start of the run, from 0.

        Raises:
          UserError: these steps would exceed the budget; the message says how many steps remain, and the budget that
            all of them need.
        """
        with self._locked() as append:
            if excess := self._spending.excess(release, steps, self._budget):
                raise UserError(
                    f"{self.path}: {excess}. Train fewer (train.steps), with more noise (a lower privacy.epsilon), or "
                    "raise the budget: dito privacy ledger DATASET --budget EPSILON."
                )
            restart = self.restarts(run)
            append("start", run, {"restart": restart, "steps": steps, "release": dataclasses.asdict(release)} | notes)
            return restart

    def shortage(self, run: str, release: Release, steps: int) -> str | None:
        """A sentence if `steps` steps of a run do not fit together with those that other runs still plan, else None."""
        with self._locked():
            found = self._spending.shortage(run, release, steps, self._budget)
        return found and (
            f"{self.path}: {found}. A step that would exceed the budget ends its run: raise the budget (dito privacy "
            "ledger DATASET --budget EPSILON) or start after those runs; ignore this if they will not go on."
        )

    def charge(self, run: str, restart: int, step: int, release: Release) -> None:
        """Charges one step, on disk when it returns; take the step only after that.

        Raises:
          UserError: the step would exceed the budget, or the disk is full; nothing is charged.
        """
        with self._locked() as append:
            if self._spending.steps_left(release, self._budget) < 1:
                raise UserError(
                    f"{self.path}: step {step} would exceed epsilon {self._budget.epsilon:g} at delta "
                    f"{self._budget.delta:g}: 0 steps remain at noise {release.noise_multiplier:g}. The training "
                    "so far is saved and private; privacy.spare_steps adds budget for repeated steps."
                )
            append("step", run, {"restart": restart, "step": step, "release": dataclasses.asdict(release)})

    def remembers(self, number: int, head: str) -> bool:
        """Whether entry `number` still has the hash `head`, which a run recorded at its start."""
        return number == 0 or self._hash_of(number) == head

    @property
    def _budget(self) -> Budget:
        assert self.budget is not None, "a ledger has a budget before it has runs"
        return self.budget

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Any]:
        """Locks the file and reads new entries; yields the function that appends an entry."""
        with exclusive(self.path) as file:
            torn = self._read(file)

            def append(kind: str, run: str, payload: dict[str, Any]) -> None:
                entry = {
                    "schema": SCHEMA, "number": self.number + 1, "time": time.time(), "kind": kind, "run": run,
                    "payload": payload, "previous": self.head,
                }  # fmt: skip
                line = _canonical(entry | {"hash": _hash(entry)}) + b"\n"
                append_line(file, self.path, line)
                self._take(line)

            if torn is not None:
                file.truncate(self._offset)
                append("torn", "", {"text": torn})
            yield append

    def _read(self, file) -> str | None:
        """Reads the entries appended since the last call; returns an incomplete last line, if there is one."""
        file.seek(self._offset - len(self._last))
        before, text = file.read(len(self._last)), file.read()
        if before != self._last:
            raise UserError(
                f"{self.path}: entry {self.number} is not the one that this process has read before: the file was "
                "truncated, rewritten or exchanged. The spent privacy is unknown: restore the file from a copy."
            )
        *lines, torn = text.split(b"\n")
        for line in lines:
            self._take(line + b"\n")
        return torn.decode(errors="replace") if torn else None

    def _take(self, line: bytes) -> None:
        """Adds the next line of the file, if it is the continuation of the chain."""
        entry, found = self._verified(line)
        self.number, self.head = entry["number"], entry["hash"]
        self._offset, self._last = self._offset + len(line), line
        if isinstance(found, Release):
            self._spending.charge(entry["run"], entry["payload"]["restart"], found)
            return
        self.entries.append(entry)
        if isinstance(found, Budget):
            self._spending.new_budget()
        elif isinstance(found, Plan):
            self._spending.start(entry["run"], found)

    def _verified(self, line: bytes) -> tuple[dict[str, Any], Budget | Plan | Release | str]:
        try:
            entry = json.loads(line)
            check_schema(entry)  # first, because a later version may compute the hash differently
            unhashed = {name: value for name, value in entry.items() if name != "hash"}
            good = entry["hash"] == _hash(unhashed)
            if good and entry["previous"] == self.head and entry["number"] == self.number + 1:
                return entry, content(entry)
        except UserError as error:
            raise UserError(f"{self.path}: line {self.number + 1} cannot be used: {error}") from error
        except (ValueError, KeyError, AttributeError, TypeError):
            pass
        raise UserError(
            f"{self.path}: line {self.number + 1} was changed, or lines before it are missing. The spent "
            "privacy is unknown: restore the file from a copy."
        )

    def _hash_of(self, number: int) -> str | None:
        with self.path.open("rb") as file:
            for count, line in enumerate(file, start=1):
                if count == number:
                    return json.loads(line)["hash"]
        return None


def same_data(one: str, other: str) -> bool:
    """Whether two descriptions are of the same data: equal texts, or equal or nested paths."""
    if one == other:
        return True
    a, b = Path(one), Path(other)
    return a.is_absolute() and b.is_absolute() and (a in b.parents or b in a.parents)


def charged_elsewhere(path: Path, data: str) -> Path | None:
    """Path of another ledger in the same folder that has a run on these data; None if there is none. Read-only."""
    for other in sorted(path.parent.glob("*.jsonl")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # skip unreadable or foreign files
            for line in other.read_bytes().splitlines() if other != path else ():
                if b'"kind":"start"' in line and same_data(json.loads(line)["payload"].get("data") or "", data):
                    return other
    return None


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()


def _hash(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(entry)).hexdigest()
