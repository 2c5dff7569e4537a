"""The privacy ledger of a data set: one file for all runs on it, in which each step is charged before it is taken.

Guarantees
  - A charge is on disk before `charge` returns, and the step is taken after that. The ledger may contain a step that a
    crash prevented, but never lacks one that was taken. A repeated step is charged again.
  - Entries form a SHA-256 hash chain: a changed, missing or moved line is an error that names the line. An incomplete
    last line after a crash belongs to a charge that never returned; it is removed, and an entry records that.
  - One process at a time writes the file, over all runs; each run reads the charges of the others before its own.
  - Not covered: users with write access can replace the file. Entries removed at the end are detected only by a run
    that has recorded an entry (`remembers`), or by a copy. Steps taken by other programs are not charged.
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
AHEAD = 64  # steps of each other release that a cached number of remaining steps allows for


@dataclasses.dataclass(frozen=True)
class Budget:
    """The privacy budget of a data set."""

    epsilon: float
    delta: float
    unit: str  # "example" or "user"


def ledger_path(dataset: str) -> Path:
    """$DITO_LEDGERS/<dataset>.jsonl, or ~/.local/share/dito_jax/ledgers/<dataset>.jsonl."""
    folder = Path(os.environ.get("DITO_LEDGERS") or Path.home() / ".local/share/dito_jax/ledgers")
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", dataset).strip("._") or "dataset"
    # A hash, so that names that differ only in replaced characters have different files.
    return (
        folder / f"{plain if plain == dataset else f'{plain}-{hashlib.sha256(dataset.encode()).hexdigest()[:8]}'}.jsonl"
    )


@dataclasses.dataclass
class Room:
    """Cache: `left` more steps of one release fit, even after the given numbers of steps of `others`."""

    left: int
    others: dict[Release, int]


class Ledger:
    """The ledger of one data set."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: list[dict[str, Any]] = []  # all entries except charges
        self.head = FIRST  # hash of the last entry
        self.number = 0  # number of entries
        self._offset = 0
        self._spent: dict[Release, int] = {}
        self._by_run: dict[str, dict[Release, int]] = {}
        self._room: dict[Release, Room] = {}
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
        return dict(self._spent if run is None else self._by_run.get(run, {}))

    def runs(self) -> list[str]:
        """Names of all started runs, in order."""
        return list(dict.fromkeys(entry["run"] for entry in self.entries if entry["kind"] == "start"))

    def restarts(self, run: str) -> int:
        """Number of starts of a run."""
        return sum(entry["kind"] == "start" and entry["run"] == run for entry in self.entries)

    def set_budget(self, budget: Budget) -> None:
        """Sets or changes the budget; earlier budgets stay in the ledger."""
        with self._locked() as append:
            append("budget", "", dataclasses.asdict(budget))

    def start(self, run: str, release: Release, steps: int, **notes: Any) -> int:
        """Records the start of a run that plans `steps` steps; returns the index of this start of the run, from 0.

        Raises:
          UserError: these steps would exceed the budget; the message says how many steps remain.
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
        """Charges one step, on disk when it returns; take the step only after that.

        Raises:
          UserError: the step would exceed the budget; nothing is charged.
        """
        with self._locked() as append:
            if self._steps_left(release) < 1:
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

    def _steps_left(self, release: Release) -> int:
        """Number of further steps that fit; cached, because the computation is slow."""
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
        """Locks the file and reads new entries; yields the function that appends an entry."""
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
        """Reads the entries appended since the last call; returns an incomplete last line, if there is one."""
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
                    f"{self.path}: line {self.number + 1} was changed, or lines before it are missing. The spent "
                    "privacy is unknown: restore the file from a copy."
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


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
