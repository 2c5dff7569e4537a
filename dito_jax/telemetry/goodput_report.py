"""Goodput report of a run: time by kind over all restarts, as a table and as a timeline (goodput.png).

goodput = seconds of training steps that did not have to be repeated / seconds from the first start to the last end
"""

import collections
import dataclasses
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dito_jax.telemetry.clock import RunClock, boot_id
from dito_jax.telemetry.goodput import IDLE, KINDS, LOST, process_age, read_rows
from dito_jax.telemetry.heartbeat import read_beat
from dito_jax.telemetry.run_directory import RunDirectory, atomic_path


REDONE = ("data", "step", "eval", "save")  # kinds of work that count as lost after going back to an earlier step
COLORS = {
    "init": "#9e9e9e", "compile": "#ffb300", "data": "#8e24aa", "step": "#43a047", "eval": "#1e88e5",
    "save": "#00acc1", "restore": "#6d4c41", LOST: "#e53935",
}  # fmt: skip
UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


@dataclasses.dataclass(frozen=True)
class Span:
    """An interval of time of one kind, in seconds since 1970; within a row spans are in the order of KINDS."""

    attempt: int  # idle time belongs to the attempt before it
    start: float
    end: float
    kind: str


@dataclasses.dataclass(frozen=True)
class Accounts:
    """The time of a run by kind, from the start of its first process to the end of its last."""

    seconds: dict[str, float]  # by kind, for all of KINDS
    spans: tuple[Span, ...]  # in order, without gaps
    attempts: int
    rollbacks: int  # within a running process
    steps_redone: int  # steps that were executed more than once

    @property
    def total(self) -> float:
        """Total time in seconds."""
        return math.fsum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the total time in training steps that were not repeated."""
        return self.seconds["step"] / self.total if self.total else 0.0


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Time of one attempt by kind, and the steps worked on in it."""

    attempt: int
    start: float
    end: float
    seconds: Mapping[str, float]
    steps: tuple[int, int] | None = None

    def back_to(self, step: int) -> "_Piece":
        """Moves the time of work beyond `step` to "lost", in proportion to the number of steps of the piece."""
        if self.steps is None or self.steps[1] <= step:
            return self
        first, last = self.steps
        beyond = min(1.0, (last - step) / (last - first + 1))
        seconds = dict(self.seconds)
        for kind in REDONE:
            if kind in seconds:
                seconds[kind] *= 1 - beyond
        lost = math.fsum(value - seconds[kind] for kind, value in self.seconds.items())
        seconds[LOST] = seconds.get(LOST, 0.0) + lost
        return dataclasses.replace(self, seconds=seconds, steps=(first, step) if first <= step else None)


def account(rows: Sequence[Mapping[str, Any]], end: float) -> Accounts:
    """Sums the rows of goodput.jsonl (at least one) up to `end`, the time when the last attempt was last alive.

    Time of an attempt that is in no row is lost. Work becomes lost when a later row resumes from an earlier step; it
    is counted as lost only once.
    """
    pieces: list[_Piece] = []
    now, attempt, reached, redone, restores = rows[0]["from"], rows[0]["attempt"], 0, 0, collections.Counter()

    def until(moment: float, kind: str) -> None:
        nonlocal now
        if moment > now:
            pieces.append(_Piece(attempt, now, moment, {kind: moment - now}))
            now = moment

    for row in rows:
        if row["attempt"] != attempt:
            until(row.get("died") or now, LOST)
            until(row["from"], IDLE)
            attempt, reached = row["attempt"], max(reached, row.get("reached") or 0)
        until(row["from"], LOST)
        steps = tuple(row["steps"]) if row.get("steps") else None
        pieces.append(_Piece(attempt, row["from"], row["to"], row["seconds"], steps))
        now, reached = row["to"], max(reached, steps[1] if steps else 0)
        if "resumed" in row:
            pieces = [piece.back_to(row["resumed"]) for piece in pieces]
            redone, reached = redone + max(0, reached - row["resumed"]), row["resumed"]
            restores[attempt] += 1
    until(end, LOST)
    attempts = len({piece.attempt for piece in pieces})
    return Accounts(_totals(pieces), _spans(pieces), attempts, restores.total() - len(restores), redone)


def read_accounts(run: RunDirectory) -> Accounts | None:
    """The goodput of a run, up to its last row if it still runs on this host; None without goodput.jsonl."""
    rows = read_rows(run)
    if not rows:
        return None
    began = next(row for row in rows if row["attempt"] == rows[-1]["attempt"])
    beat = read_beat(run.heartbeats / "0")
    if beat is None or "closed" in rows[-1] or _runs(began):
        return account(rows, rows[-1]["to"])
    return account(rows, beat.alive)


def table(accounts: Accounts) -> str:
    """The goodput as a table: one line per kind, then attempts, restarts, rollbacks and repeated steps."""
    total = accounts.total
    lines = [f"{'kind':<8}{'seconds':>14}{'share':>9}"]
    for kind, seconds in (*accounts.seconds.items(), ("total", total)):
        lines.append(f"{kind:<8}{seconds:>14,.1f}{seconds / total if total else 0.0:>9.2%}")
    counts = {
        "attempts": accounts.attempts, "restarts": accounts.attempts - 1, "rollbacks": accounts.rollbacks,
        "steps redone": accounts.steps_redone,
    }  # fmt: skip
    lines.append(f"goodput {accounts.goodput:.2%}; " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
    return "\n".join(lines)


def timeline(accounts: Accounts, path: str | os.PathLike) -> None:
    """Draws each attempt as a bar over the time since the first start, coloured by kind; idle time is blank."""
    first, last = accounts.spans[0].start, accounts.spans[-1].end
    unit, scale = next((pair for pair in UNITS if last - first >= 2 * pair[1]), UNITS[-1])
    bars = collections.defaultdict(list)
    for span in accounts.spans:
        if span.kind != IDLE:
            bars[span.attempt, span.kind].append(((span.start - first) / scale, (span.end - span.start) / scale))
    figure = Figure(figsize=(10, 1.6 + min(0.35 * accounts.attempts, 20)), layout="constrained")
    axes = figure.subplots()
    for (attempt, kind), ranges in bars.items():
        axes.broken_barh(ranges, (attempt - 0.4, 0.8), facecolors=COLORS[kind], linewidth=0)
    axes.set_xlim(0, max((last - first) / scale, 1e-9))
    axes.set_ylim(max(span.attempt for span in accounts.spans) + 0.5, 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"{unit} since the first start")
    axes.set_ylabel("attempt")
    used = [kind for kind in KINDS if any(kind == drawn for _, drawn in bars)]
    patches = [
        Patch(color=COLORS[kind], label=f"{kind} {accounts.seconds[kind] / accounts.total:.1%}") for kind in used
    ]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(used) or 1, frameon=False, fontsize="small")
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _totals(pieces: Sequence[_Piece]) -> dict[str, float]:
    return {kind: math.fsum(piece.seconds.get(kind, 0.0) for piece in pieces) for kind in KINDS}


def _spans(pieces: Sequence[_Piece]) -> tuple[Span, ...]:
    """Splits pieces into spans of one kind, and joins neighbouring spans of the same kind."""
    spans: list[Span] = []
    for piece in pieces:
        start = piece.start
        for kind in KINDS:
            if not (seconds := piece.seconds.get(kind, 0.0)):
                continue
            end, start = start + seconds, start + seconds
            if spans and (spans[-1].attempt, spans[-1].kind) == (piece.attempt, kind):
                spans[-1] = dataclasses.replace(spans[-1], end=end)
            else:
                spans.append(Span(piece.attempt, end - seconds, end, kind))
    return tuple(spans)


def _runs(began: Mapping[str, Any]) -> bool:
    """Whether the process of an attempt's first row still runs on this host; its pid may have been reused since."""
    age = process_age(began.get("pid", "")) if began.get("host") == socket.gethostname() else None
    boot = began.get("boot")
    if age is None or boot not in (None, boot_id()):
        return False
    clock = time.time if boot is None else RunClock(boot, began["offset"])  # version 0.2.0 had the time of day
    return clock() - age <= began["to"]
