"""Where the time of a run went: every second of it, over all its starts, belongs to one kind.

    init      Python, imports, devices              eval      samples and figures
    compile   the step                              save      waiting for a checkpoint
    data      waiting for a batch                   restore   reading one, and checking it
    step      training                              lost      work that was done again, or never recorded
                                                    idle      no process was running

goodput.jsonl has a row for each stretch between two flushes. What a killed process had not flushed is lost, and so is
the work beyond the checkpoint from which the run went on. Goodput is the share of `step`.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dito_jax.training.heartbeat import PHASES, Beat, Heartbeat
from dito_jax.training.run_directory import RunDirectory, explained, json_lines


KINDS = ("init", "compile", "data", "step", "eval", "save", "restore", "lost", "idle")
WORK = ("data", "step", "eval", "save")  # what is lost with the steps it belongs to


class Phases:
    """Says where a process is, to its heartbeat."""

    def __init__(self, heartbeat: Heartbeat):
        self._heartbeat, self._stack, self._number = heartbeat, ["init"], 0

    @contextlib.contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """The time until the end of the block is of this kind, but for what is of another in it."""
        self._enter(kind)
        try:
            yield
        finally:
            self._leave()

    def step(self, number: int) -> None:
        """The step that is worked on from now on."""
        self._number = number
        self._heartbeat.beat(number, self._stack[-1])

    def resumed(self, step: int) -> None:
        """The state is that of `step`: what was done beyond it before will be done again."""

    def flush(self) -> None:
        """Puts on the disk what happened since the last flush."""

    def _enter(self, kind: str) -> None:
        assert kind in PHASES, kind
        self._stack.append(kind)
        self._heartbeat.beat(self._number, kind)

    def _leave(self) -> None:
        self._stack.pop()
        self._heartbeat.beat(self._number, self._stack[-1])


class Ledger(Phases):
    """Keeps the account of one process of a run, and writes it to goodput.jsonl.

    `previous` is the last beat of the process before it, read before its file was written anew.
    """

    def __init__(
        self,
        run: RunDirectory,
        heartbeat: Heartbeat,
        previous: Beat | None,
        *,
        clock: Callable[[], float] = time.time,
        born: float | None = None,
    ):
        super().__init__(heartbeat)
        self._run, self._clock = run, clock
        rows = json_lines(run.goodput)
        self._attempt = 1 + max((row["attempt"] for row in rows), default=0)
        self._from = self._since = process_birth() if born is None else born
        self._seconds: dict[str, float] = {}
        self._steps: tuple[int, int] | None = None
        died = previous.alive if previous and rows else None
        self._append({"event": "start", "from": self._from, "died": died})

    def step(self, number: int) -> None:
        """The step that is worked on from now on."""
        super().step(number)
        self._steps = (self._steps[0] if self._steps else number, number)

    def resumed(self, step: int) -> None:
        """The state is that of `step`: what was done beyond it before will be done again."""
        self.flush()
        self._append({"event": "resume", "step": step})

    def flush(self) -> None:
        """Puts on the disk what happened since the last flush."""
        self._count()
        row = {"from": self._from, "to": self._since, "steps": self._steps, "seconds": self._seconds}
        self._append(row)
        self._from, self._seconds, self._steps = self._since, {}, None

    def _enter(self, kind: str) -> None:
        self._count()
        super()._enter(kind)

    def _leave(self) -> None:
        self._count()
        super()._leave()

    def _count(self) -> None:
        now = self._clock()
        kind = self._stack[-1]
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._since
        self._since = now

    def _append(self, row: dict[str, Any]) -> None:
        with explained(self._run.goodput):
            self._run.append(self._run.goodput, json.dumps({"attempt": self._attempt} | row) + "\n")


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of one attempt."""

    attempt: int
    start: float  # seconds since 1970
    end: float
    seconds: dict[str, float]  # by kind; they add up to end - start
    steps: tuple[int, int] | None = None  # first and last that were worked on

    def losing(self, step: int) -> "Span":
        """As it is when the run goes on from `step`: the work beyond it is lost."""
        if self.steps is None or self.steps[1] <= step:
            return self
        first, last = self.steps
        share = (last - max(step, first - 1)) / (last - first + 1)
        lost = {kind: share * s for kind, s in self.seconds.items() if kind in WORK}
        seconds = {kind: s - lost.get(kind, 0.0) for kind, s in self.seconds.items()}
        seconds["lost"] = seconds.get("lost", 0.0) + sum(lost.values())
        return dataclasses.replace(self, seconds=seconds, steps=(first, step) if step >= first else None)


def account(run: RunDirectory, last: Beat | None) -> list[Span]:
    """Every second of the run so far, in order. `last` is the beat of its process 0: how far the last attempt came."""
    spans: list[Span] = []
    for row in json_lines(run.goodput):
        attempt = row["attempt"]
        if row.get("event") == "start":
            if spans and row["died"] is not None:
                spans += _unrecorded(spans[-1], min(row["died"], row["from"]))
            if spans and row["from"] > spans[-1].end:
                gap = row["from"] - spans[-1].end
                spans.append(Span(spans[-1].attempt, spans[-1].end, row["from"], {"idle": gap}))
            spans.append(Span(attempt, row["from"], row["from"], {}))
        elif row.get("event") == "resume":
            spans = [span.losing(row["step"]) for span in spans]
        else:
            steps = tuple(row["steps"]) if row["steps"] else None
            spans.append(Span(attempt, row["from"], row["to"], row["seconds"], steps))
    return spans + (_unrecorded(spans[-1], last.alive) if spans and last is not None else [])


def totals(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by kind, all KINDS; they add up to the wall time of the run."""
    return {kind: sum(span.seconds.get(kind, 0.0) for span in spans) for kind in KINDS}


def process_birth() -> float:
    """When this process began, in seconds since 1970; now, where /proc does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine booted
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError, ValueError):
        return time.time()
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def _unrecorded(before: Span, died: float) -> list[Span]:
    """From the last flush of an attempt to its death: what was done then was lost with it."""
    lost = died - before.end
    return [Span(before.attempt, before.end, died, {"lost": lost})] if lost > 0 else []
