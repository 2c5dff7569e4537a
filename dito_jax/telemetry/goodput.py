"""Where the time of a run goes, written down as it goes: goodput.jsonl, over all its starts.

One row an interval, seconds by kind; goodput_report.py adds the rows up. What a killed process had not written yet is
lost, so flush at log intervals.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dito_jax.telemetry.heartbeat import PHASES, Beat, Heartbeat
from dito_jax.telemetry.run_directory import RunDirectory, explained, json_lines


WORK = tuple(phase for phase in PHASES if phase != "done")
LOST, IDLE = "lost", "idle"  # work that had to be done again; no process ran
KINDS = (*WORK, LOST, IDLE)


class Phases:
    """What a process is doing, told to its heartbeat. Call it from the main thread only."""

    def __init__(self, heartbeat: Heartbeat):
        self._heartbeat = heartbeat
        self._number = 0
        self._kinds = ["init"]  # the innermost is the last

    @contextlib.contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """The time inside is of this kind, one of WORK, but for what phases inside it take."""
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
        """Training step `number` begins; from the first one on, what is in no phase is of kind "step"."""
        self._tally()
        self._number, self._kinds[0] = number, "step"
        self._beat()

    def resumed(self, step: int) -> None:
        """The state is that after `step`: restored at the start (0 for a new run), or rolled back to."""
        self._number = step
        self._beat()

    def flush(self) -> None:
        """Writes down the time since the last row.

        Call it at log intervals, and after a save and what else follows a step: only of rows that do not reach across
        a checkpoint is it exact what a restart from there loses.
        """

    def close(self) -> None:
        """The work is over; what comes later is idle."""

    def _tally(self) -> None:
        """The innermost phase, or the step, is about to change."""

    def _beat(self) -> None:
        self._heartbeat.beat(self._number, self._kinds[-1])


class Ledger(Phases):
    """Phases that are also written down; one process a run has it, the others have Phases.

    A row holds `attempt`, which start of the run it is of, from 1; `from` and `to`, seconds since 1970, the `to` of
    one being the `from` of the next; `steps`, the first and the last worked on, or null; `seconds` by kind, which add
    up to `to` - `from`. The first row of an attempt tells its `pid` and `host`, and `died` and `reached`, when and at
    what step the attempt before it was last alive, or null. A row with `resumed` says that the state at its end is
    that after step `resumed`; one with `closed`, that the attempt ended with it.
    """

    def __init__(
        self,
        run: RunDirectory,
        heartbeat: Heartbeat,
        *,
        previous: Beat | None,
        clock: Callable[[], float] = time.time,
        born: float | None = None,
    ):
        """Begins an attempt: the time since `born`, when this process began (default: ask the system), is "init".

        `previous` is the last beat of the attempt before this one. Read it before Heartbeat overwrites it.
        """
        super().__init__(heartbeat)
        self._run, self._clock = run, clock
        self._seconds: dict[str, float] = {}
        self._steps: tuple[int, int] | None = None
        self._at_step = False
        self._attempt, died, reached = 1, None, None
        if rows := json_lines(run.goodput):
            self._attempt, died = rows[-1]["attempt"] + 1, rows[-1]["to"]
            if previous is not None and "closed" not in rows[-1]:
                died, reached = max(died, previous.alive), previous.step
        if born is None:
            born = clock() - (process_age("self") or 0.0)
        # A clock may have been set back, and this process may have begun before the last one ended: no second counts
        # twice.
        self._since = born if died is None else max(died, min(born, clock()))
        self._from = self._since
        self._tally()
        self._write(died=died, reached=reached, pid=os.getpid(), host=socket.gethostname())

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


def process_age(pid: int | str) -> float | None:
    """Seconds since a process began, to a hundredth, its Python's start included; None if it has ended.

    None as well where there is no /proc. A program started by `exec` is as old as the one it replaced.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if state == "Z":  # ended, but its parent has not asked yet
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[18]) / os.sysconf("SC_CLK_TCK")
