"""Goodput records: how a run spends its time, over all its restarts, in goodput.jsonl.

Each row has the seconds of one interval by kind of work; goodput_report.py sums the rows. The time since the last row
counts as lost if the process is killed, so call `flush` at log intervals.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dito_jax.telemetry.clock import SINCE_BOOT, RunClock
from dito_jax.telemetry.heartbeat import PHASES, Beat, Heartbeat
from dito_jax.telemetry.run_directory import RunDirectory, explained, json_lines


WORK = tuple(phase for phase in PHASES if phase != "done")
LOST, IDLE = "lost", "idle"  # work that had to be repeated; time without a running process
KINDS = (*WORK, LOST, IDLE)


class Phases:
    """Tracks the phase of a process (init, compile, data, step, ...) in its heartbeat; for the main thread only."""

    def __init__(self, heartbeat: Heartbeat):
        self._heartbeat = heartbeat
        self._number = 0
        self._kinds = ["init"]  # stack of phases; the innermost is last

    @contextlib.contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """Time inside the block counts as `kind`, one of WORK, except for nested phases."""
        assert kind in WORK, kind
        self._tally()
        self._kinds.append(kind)
        self._beat()
        try:
            yield
        finally:
            self._tally()
            self._kinds.pop()
            self._beat()

    def step(self, number: int) -> None:
        """Starts training step `number`; from the first step on, time outside any phase is of kind "step"."""
        self._tally()
        self._number, self._kinds[0] = number, "step"
        self._beat()

    def resumed(self, step: int) -> None:
        """Records that the state is now that after `step`: restored (0 for a new run), or rolled back to."""
        self._number = step
        self._beat()

    def progress(self) -> None:
        """Records progress within the current phase, so that a long one does not count as hung."""
        self._beat()

    def flush(self) -> None:
        """Writes a row with the time since the last row.

        Call it at log intervals, and after a save and everything else that follows a step: the time that a restart
        loses is exact only if no row spans a checkpoint.
        """

    def close(self) -> None:
        """Ends the records; later time is idle."""

    def _tally(self) -> None:
        """Adds the time of the current phase, before the phase or the step changes."""

    def _beat(self) -> None:
        self._heartbeat.beat(self._number, self._kinds[-1])


class Ledger(Phases):
    """Phases that are also written to goodput.jsonl, in process 0; the other processes use Phases.

    Fields of a row: `attempt`, the number of the start, from 1; `from` and `to`, seconds since 1970 (`to` of one row is
    `from` of the next); `steps`, the first and last step worked on, or null; `seconds` by kind, whose sum is `to` -
    `from`. The first row of an attempt also has its `pid` and `host`, the `boot` and `offset` of its clock, and `died`
    and `reached`: time and step at which the previous attempt was last alive, or null. `resumed` means that the state
    at the end of the row is that after step `resumed`; `closed` means that the attempt ended with this row.
    """

    def __init__(
        self,
        run: RunDirectory,
        heartbeat: Heartbeat,
        *,
        previous: Beat | None,
        clock: Callable[[], float],
        born: float | None = None,
    ):
        """Starts an attempt; the time since `born`, the start of this process (default: from /proc), is "init".

        `previous` is the last heartbeat of the previous attempt; read it before Heartbeat overwrites the file. `clock`
        is that of the run (clock.py), also for the heartbeat.
        """
        super().__init__(heartbeat)
        self._run, self._clock = run, clock
        self._seconds: dict[str, float] = {}
        self._steps: tuple[int, int] | None = None
        self._at_step = False
        self._attempt, died, reached = 1, None, None
        if rows := read_rows(run):
            self._attempt, died = rows[-1]["attempt"] + 1, rows[-1]["to"]
            if previous is not None and "closed" not in rows[-1]:
                died, reached = max(died, previous.alive), previous.step
        if born is None:
            born = clock() - (process_age("self") or 0.0)
        # Not before the end of the previous attempt, so that no second counts twice: the clock may have been set back,
        # or this process may have started before the previous one ended.
        self._since = born if died is None else max(died, min(born, clock()))
        self._from = self._since
        self._tally()
        here = dataclasses.asdict(clock) if isinstance(clock, RunClock) else {}
        self._write(died=died, reached=reached, pid=os.getpid(), host=socket.gethostname(), **here)

    def step(self, number: int) -> None:
        super().step(number)
        self._at_step = True
        self._steps = (self._steps[0] if self._steps else number, number)

    def resumed(self, step: int) -> None:
        self._tally()
        self._write(resumed=step)
        self._steps, self._at_step = None, False
        super().resumed(step)

    def flush(self) -> None:
        self._tally()
        if self._since > self._from:
            self._write()

    def close(self) -> None:
        self._tally()
        self._write(closed=True)

    def _tally(self) -> None:
        now = max(self._clock(), self._since)
        kind = self._kinds[-1]
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._since
        self._since = now

    def _write(self, **marks: Any) -> None:
        steps = self._steps or ((self._number, self._number) if self._at_step else None)
        seconds = {kind: value for kind, value in self._seconds.items() if value}
        row = {"attempt": self._attempt, "from": self._from, "to": self._since, "steps": steps, "seconds": seconds}
        with explained(self._run.goodput):
            self._run.append(self._run.goodput, json.dumps(row | marks) + "\n")
        self._from, self._steps, self._seconds = self._since, None, {}


def read_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows of goodput.jsonl; what is no row of it is skipped."""
    rows = json_lines(run.goodput, **{"attempt": int, "from": float, "to": float, "seconds": dict})
    return [row for row in rows if _whole(row)]


def _whole(row: dict[str, Any]) -> bool:
    """Whether the entries of a row that are not in every row are what they should be."""
    steps, marks = row.get("steps"), [row.get(name) or 0 for name in ("died", "reached", "resumed", "offset")]
    numbers = [*row["seconds"].values(), *marks]
    pair = steps is None or isinstance(steps, list) and len(steps) == 2 and all(isinstance(n, int) for n in steps)
    return pair and set(row["seconds"]) <= set(WORK) and all(isinstance(number, int | float) for number in numbers)


def process_age(pid: int | str) -> float | None:
    """Age of a process in seconds, to a hundredth, including the start of Python; None if it has ended.

    Also None without /proc. The age of a program started by `exec` counts from the program that it replaced.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if state == "Z":  # a zombie: ended, but not yet waited for
        return None
    return time.clock_gettime(SINCE_BOOT) - int(fields[18]) / os.sysconf("SC_CLK_TCK")
