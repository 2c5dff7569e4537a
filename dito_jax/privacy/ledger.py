"""What was spent of a data set's privacy: one file for all runs on it, written before it is spent.

Guarantees
  - A charge is on the disk before `charge` returns, and a step is taken after that: the ledger may count a step that
    a crash prevented, and never lacks one that was taken. A step that is done again is charged again.
  - Entries are chained by SHA-256: a changed, missing or moved line is an error that names it. A line that a crash
    left half-written belongs to a charge that never returned; it is cut off, and an entry says so.
  - One file has one writer at a time, in any number of runs; each sees what the others spent before it charges.
  - Not covered: who may write the file may write another one. Entries cut off at the end show only against what a run
    remembers of it (`remembers`), or a copy elsewhere. Steps that were never charged, of a program that is not this.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dito_jax.errors import UserError
from dito_jax.privacy.accounting import Release, merged, remaining_steps


FIRST = "0" * 64
AHEAD = 64  # steps of other runs that are reckoned with at once


@dataclasses.dataclass(frozen=True)
class Budget:
    """What may be spent in all."""

    epsilon: float
    delta: float
    unit: str  # "example" or "user"


def ledger_path(dataset: str) -> Path:
    """$DITO_LEDGERS/<dataset>.jsonl, or ~/.local/share/dito_jax/ledgers/<dataset>.jsonl."""
    folder = Path(os.environ.get("DITO_LEDGERS") or Path.home() / ".local/share/dito_jax/ledgers")
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", dataset).strip("._") or "dataset"
    # Names that differ only in what was replaced must not share a budget.
    return (
        folder / f"{plain if plain == dataset else f'{plain}-{hashlib.sha256(dataset.encode()).hexdigest()[:8]}'}.jsonl"
    )


@dataclasses.dataclass
class Room:
    """`left` more steps of one kind fit, also after as many of the other kinds as `others` says."""

    left: int
    others: dict[Release, int]


class Ledger:
    """The ledger of one data set."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: list[dict[str, Any]] = []  # all but charges
        self.head = FIRST  # the hash of the last entry
        self.number = 0  # how many entries there are
        self._offset = 0
        self._spent: dict[Release, int] = {}
        self._by_run: dict[str, dict[Release, int]] = {}
        self._room: dict[Release, Room] = {}
        if path.exists():
            with self._locked():
                pass

    @property
    def budget(self) -> Budget | None:
        """The last that was set; None of a ledger that nobody opened."""
        found = [entry for entry in self.entries if entry["kind"] == "budget"]
        return Budget(**found[-1]["payload"]) if found else None

    def spent(self, run: str | None = None) -> Mapping[Release, int]:
        """Steps by what they released, of all runs or of one."""
        return dict(self._spent if run is None else self._by_run.get(run, {}))

    def runs(self) -> list[str]:
        """Every run that was started, in order."""
        return list(dict.fromkeys(entry["run"] for entry in self.entries if entry["kind"] == "start"))

    def restarts(self, run: str) -> int:
        """How often a run was started."""
        return sum(entry["kind"] == "start" and entry["run"] == run for entry in self.entries)

    def set_budget(self, budget: Budget) -> None:
        """Sets or changes what may be spent; the old figure stays on record."""
        with self._locked() as append:
            append("budget", "", dataclasses.asdict(budget))

    def start(self, run: str, release: Release, steps: int, **notes: Any) -> int:
        """Enters that a run starts, with so many steps before it; which start of the run it is, from 0.

        Raises:
          UserError: those steps would exceed the budget; the line says how many would not.
        """
        with self._locked() as append:
            left = self._steps_left(release)
            if steps > left:
                raise UserError(
                    f"{self.path}: {steps} steps at noise {release.noise_multiplier:g} would exceed epsilon "
                    f"{self._budget.epsilon:g} at delta {self._budget.delta:g}: {left} remain. Train "
                    "fewer (train.steps), with more noise (a lower privacy.epsilon), or raise the budget: "
                    "dito privacy ledger DATASET --budget EPSILON."
                )
            restart = self.restarts(run)
            append("start", run, {"restart": restart, "steps": steps, "release": dataclasses.asdict(release)} | notes)
            return restart

    def charge(self, run: str, restart: int, step: int, release: Release) -> None:
        """Enters one step, on the disk when it returns: take the step after that, and not before.

        Raises:
          UserError: it would exceed the budget; nothing is entered.
        """
        with self._locked() as append:
            if self._steps_left(release) < 1:
                raise UserError(
                    f"{self.path}: step {step} would exceed epsilon {self._budget.epsilon:g} at delta "
                    f"{self._budget.delta:g}: 0 steps remain at noise {release.noise_multiplier:g}. What was trained "
                    "so far is saved and private; privacy.spare_steps pays for steps that are done again."
                )
            append("step", run, {"restart": restart, "step": step, "release": dataclasses.asdict(release)})

    def remembers(self, number: int, head: str) -> bool:
        """Whether entry `number` has that hash still: what a run noted of the ledger when it began."""
        return number == 0 or self._hash_of(number) == head

    @property
    def _budget(self) -> Budget:
        assert self.budget is not None, "a ledger has a budget before it has runs"
        return self.budget

    def _steps_left(self, release: Release) -> int:
        """How many more such steps fit; seldom computed, for it takes long."""
        room = self._room.get(release)
        if room is None or min(room.left, *room.others.values(), 0) < 0:
            room = self._computed_room(release, AHEAD)
        if room.left < 1:
            room = self._computed_room(release, 0)
        self._room[release] = room
        return room.left

    def _computed_room(self, release: Release, ahead: int) -> Room:
        others = {other: ahead for other in self._spent if other != release}
        budget = self._budget
        return Room(remaining_steps(merged(self._spent, others), release, budget.epsilon, budget.delta), others)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Any]:
        """Alone with the file, and up to date; gives the function that appends to it."""
        if new := not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if new:
                _sync_directory(self.path.parent)
            fcntl.lockf(file, fcntl.LOCK_EX)
            torn = self._read(file)

            def append(kind: str, run: str, payload: dict[str, Any]) -> None:
                entry = {
                    "number": self.number + 1, "time": time.time(), "kind": kind, "run": run, "payload": payload,
                    "previous": self.head,
                }  # fmt: skip
                line = _canonical(entry | {"hash": _hash(entry)}) + b"\n"
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
                self._take(json.loads(line))
                self._offset += len(line)

            if torn is not None:
                file.truncate(self._offset)
                append("torn", "", {"text": torn})
            yield append

    def _read(self, file) -> str | None:
        """Takes what was appended since; a last line without an end is returned."""
        file.seek(self._offset)
        *lines, torn = file.read().split(b"\n")
        for line in lines:
            try:
                entry = json.loads(line)
                stated = entry.pop("hash")
                good = stated == _hash(entry) and entry["previous"] == self.head and entry["number"] == self.number + 1
                entry["hash"] = stated
            except (ValueError, KeyError, AttributeError, TypeError):
                good = False
            if not good:
                raise UserError(
                    f"{self.path}: line {self.number + 1} was changed, or lines before it are missing. Nothing can be "
                    "said of what was spent: restore the file from a copy."
                )
            self._take(entry)
            self._offset += len(line) + 1
        return torn.decode(errors="replace") if torn else None

    def _take(self, entry: dict[str, Any]) -> None:
        self.number, self.head = entry["number"], entry["hash"]
        if entry["kind"] != "step":
            self.entries.append(entry)
            if entry["kind"] == "budget":
                self._room.clear()
            return
        release = Release(**entry["payload"]["release"])
        for of_release, room in self._room.items():
            if of_release == release:
                room.left -= 1
            else:
                room.others[release] = room.others.get(release, 0) - 1
        self._spent = merged(self._spent, {release: 1})
        self._by_run[entry["run"]] = merged(self._by_run.get(entry["run"], {}), {release: 1})

    def _hash_of(self, number: int) -> str | None:
        with self.path.open("rb") as file:
            for count, line in enumerate(file, start=1):
                if count == number:
                    return json.loads(line)["hash"]
        return None


def same_data(one: str, other: str) -> bool:
    """Whether two descriptions are of the same data: the same words, or a path and one inside it."""
    if one == other:
        return True
    a, b = Path(one), Path(other)
    return a.is_absolute() and b.is_absolute() and (a in b.parents or b in a.parents)


def charged_elsewhere(path: Path, data: str) -> Path | None:
    """Another ledger in the folder of `path`, if a run on these data was started with it; none is changed."""
    for other in sorted(path.parent.glob("*.jsonl")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not ours to judge, or to read
            for line in other.read_bytes().splitlines() if other != path else ():
                if b'"kind":"start"' in line and same_data(json.loads(line)["payload"].get("data") or "", data):
                    return other
    return None


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()


def _hash(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(entry)).hexdigest()


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
