"""Hang watchdog: ends a process that makes no progress, and reports where it was and which process is behind.

A thread checks the heartbeat. The timeout of a step depends on the duration of earlier steps; other phases have a
longer timeout. After the timeout the process exits with code 86, whatever the main thread is blocked in, and even if
the key-value store of jax.distributed does not answer or the disk is full. Several processes exit together: the first
one to time out informs the others, each writes its stack traces, and the last published status of all processes shows
which one is behind.

The thread needs the GIL. For C code that hangs while it holds the GIL, a faulthandler timer, which does not need it,
ends the process (exit code 1, stack traces on stderr) some time after the watchdog's own timeout.
"""

import contextlib
import faulthandler
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dito_jax import distributed
from dito_jax.errors import HUNG
from dito_jax.telemetry.events import Events, read_events
from dito_jax.telemetry.heartbeat import PHASES, Beat, Heartbeat
from dito_jax.telemetry.run_directory import RunDirectory


STEP = ("data", "step")  # the phases that belong to a training step
STEPS = 100  # number of recent steps from which the timeout is computed
LAST_EVENTS = 20
HANGS, SIGNS = "hangs", "signs"  # prefixes in the key-value store: hung processes, status of each process
REPORT_SECONDS = 20.0  # time limit of the whole report
STORE_SECONDS = 3.0
BACKSTOP_SECONDS = 60.0


@dataclass(frozen=True)
class WatchdogConfig:
    """When a process counts as hung."""

    floor_seconds: float = 120.0
    """Minimum timeout of a training step in seconds."""
    factor: float = 10.0
    """Timeout of a training step as a multiple of the slowest of the last 100 steps, if above floor_seconds."""
    phase_timeout_seconds: float = 1800.0
    """Timeout in seconds of every other phase: compiling, restoring, saving, evaluating."""
    grace_seconds: float = 60.0
    """Seconds from a stop signal to the end of the process, including the save."""


class Watchdog:
    """A context manager that watches this process; it also updates the heartbeat's `alive` time, but no progress."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        run: RunDirectory,
        events: Events,
        config: WatchdogConfig,
        *,
        process: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._heartbeat, self._run, self._events, self._config = heartbeat, run, events, config
        self._process, self._several, self._clock = process, distributed.count() > 1, clock
        self._ticks, self._by = 0, float("inf")
        self._seen, self._moved = heartbeat.recent[-1], clock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def expect_within(self, seconds: float) -> None:
        """Sets a deadline for the end of the process after a stop request."""
        self._by = min(self._by, self._clock() + seconds)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Does not return if the watchdog is ending the process: an error in the main thread is then a consequence."""
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    # ------------------------------------------------------------------------------------------------------- watching
    def deadline(self) -> float:
        """Timeout of the current phase in seconds."""
        beats = list(self._heartbeat.recent)
        if beats[-1].phase not in STEP:
            return self._config.phase_timeout_seconds
        return max(self._config.floor_seconds, self._config.factor * max(step_seconds(beats), default=0.0))

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.deadline() / 10)):
            self._tick()
            now, last = self._clock(), self._heartbeat.recent[-1]
            if last is not self._seen:
                self._seen, self._moved = last, now
            still, deadline = now - self._moved, self.deadline()
            where = f"at step {last.step} ({last.phase}) since {still:.1f} s"
            if still > deadline:
                self._end(f"{where}, {deadline:.1f} s were allowed")
            if now > self._by:
                self._end(f"{where}, and did not stop in time after a stop request")
            if others := self._hung_elsewhere():
                self._end(f"{where}, and process {min(others, key=int)} hangs")

    def _tick(self) -> None:
        """Updates the heartbeat file, the faulthandler timer and the published status."""
        self._ticks += 1
        self._heartbeat.alive()
        limit = max(self.deadline(), self._config.phase_timeout_seconds) + BACKSTOP_SECONDS
        faulthandler.dump_traceback_later(min(limit, max(1.0, self._by - self._clock() + BACKSTOP_SECONDS)), exit=True)
        if self._several:
            with contextlib.suppress(TimeoutError, RuntimeError):
                self._publish()

    def _publish(self) -> None:
        sign = Sign(self._seen.step, self._seen.phase, self._clock() - self._moved, self._ticks)
        distributed.publish(f"{SIGNS}/{self._process}", sign.text(), seconds=STORE_SECONDS)

    def _hung_elsewhere(self) -> set[str]:
        """Numbers of the other processes that have published a hang."""
        if not self._several:
            return set()
        with contextlib.suppress(TimeoutError, RuntimeError):
            return distributed.published(HANGS, seconds=STORE_SECONDS).keys() - {str(self._process)}
        return set()

    # --------------------------------------------------------------------------------------------------------- ending
    def _end(self, why: str) -> None:
        """Ends the process; it does not return."""
        # In a thread, because any part of the report may block: a full pipe, a file system that does not answer.
        report = threading.Thread(target=self._report, args=(why,), name="report", daemon=True)
        report.start()
        report.join(REPORT_SECONDS)
        os._exit(HUNG)

    def _report(self, why: str) -> None:
        said = [f"process {self._process} hangs: {why}"]
        for part in (
            self._publish_hang,
            lambda: self._write_stacks(said[0] + "."),
            lambda: faulthandler.dump_traceback(file=sys.stderr, all_threads=True),
            lambda: _print(*(f"event: {row}" for row in read_events(self._run)[-LAST_EVENTS:])),
            lambda: said.append(self._processes_behind()),
            lambda: self._record("; ".join(filter(None, said)) + "."),
        ):
            try:
                part()
            except Exception as error:  # continue with the rest of the report
                _print(f"watchdog: {type(error).__name__}: {error}")
        distributed.leave(HUNG, seconds=5.0)

    def _publish_hang(self) -> None:
        if self._several:
            self._publish()
            distributed.publish(f"{HANGS}/{self._process}", "", seconds=STORE_SECONDS)

    def _write_stacks(self, said: str) -> None:
        with (self._run.path / f"stacks-{self._process}.txt").open("a") as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {said}", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)

    def _processes_behind(self) -> str:
        if not self._several:
            return ""
        try:
            before = distributed.published(SIGNS, seconds=STORE_SECONDS)
            time.sleep(2.5)  # every process that runs publishes again within this time
            after = distributed.published(SIGNS, seconds=STORE_SECONDS)
            ending = distributed.published(HANGS, seconds=STORE_SECONDS).keys()
        except TimeoutError:
            return "process 0, which holds the key-value store, does not answer: it is frozen or has ended"
        return behind(
            {int(number): Sign.of(text) for number, text in after.items()},
            silent={int(number) for number in after if before.get(number) == after[number] and number not in ending},
            count=distributed.count(),
        )

    def _record(self, said: str) -> None:
        beat = self._seen
        try:
            self._events.record("hang", said, step=beat.step, phase=beat.phase)
        except Exception:
            _print(said)
            raise


@dataclass(frozen=True)
class Sign:
    """Published status of one process."""

    step: int
    phase: str
    still: float  # seconds since its last progress
    tick: int  # counter that increases while the process runs

    def text(self) -> str:
        """The status as text for the key-value store; `of` is the inverse."""
        return f"{self.step} {self.phase} {self.still:.1f} {self.tick}"

    @classmethod
    def of(cls, text: str) -> "Sign":
        step, phase, still, tick = text.split()
        return cls(int(step), phase, float(still), int(tick))

    def where(self) -> str:
        return f"step {self.step} ({self.phase})"


def step_seconds(beats: Sequence[Beat]) -> list[float]:
    """Durations of the phases of the last 100 steps, without the current one."""
    first = beats[-1].step - STEPS
    return [
        after.began - before.began
        for before, after in itertools.pairwise(beats)
        if before.phase in STEP and before.step >= first
    ]


def behind(signs: dict[int, Sign], *, silent: set[int], count: int) -> str:
    """A clause that names the processes that are behind: those in `silent`, or else those at the lowest step."""
    if unheard := set(range(count)) - signs.keys():
        return f"{_named(unheard)} never published a status"
    order = {number: (sign.step, PHASES.index(sign.phase)) for number, sign in signs.items()}
    late = silent or {number for number in order if order[number] == min(order.values())}
    others = sorted({signs[number].where() for number in signs if number not in late})
    if not others:
        return f"no process is behind: all are at {signs[0].where()}"
    where = "; ".join(f"at {signs[number].where()} since {signs[number].still:.1f} s" for number in sorted(late)[:3])
    are = "is" if len(late) == 1 else "are"
    state = f"{are} frozen, last seen" if silent else f"{are} behind:"
    return f"{_named(late)} {state} {where}; the others are at {', '.join(others[:3])}"


def _named(numbers: set[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, sorted(numbers)))}"


def _print(*lines: str) -> None:
    print(*lines, sep="\n", file=sys.stderr, flush=True)
