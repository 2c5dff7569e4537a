"""The watchdog: ends a process that makes no progress, and says where it was and who is behind.

A thread looks at the heartbeat. A step may take a while, by what the steps before it took; anything else may take
longer. What is late is ended with exit code 86, whatever the main thread is stuck in, and although the store of the
run does not answer or the disk is full. Several processes end together: the first to notice tells the others, each
writes where it was, and all know from what each last published who is behind.

The thread needs Python's lock. For C code that hangs with it, a timer of faulthandler, which needs none, ends the
process (exit code 1, stacks on stderr) well after the watchdog should have.
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


STEP = ("data", "step")  # the phases of a step
STEPS = 100  # that are remembered
LAST_EVENTS = 20
HANGS, SIGNS = "hangs", "signs"  # where the store has who is ending, and where each was last
REPORT_SECONDS = 20.0  # what all that is said at the end may take, together
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
    """Watches while it is entered. It beats the heart of the process: that it is alive, never that it goes on."""

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
        """From now on the process has this long to end, whatever it does: it was asked to stop."""
        self._by = min(self._by, self._clock() + seconds)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Never returns if the process is being ended: what the main thread has met then is not the cause."""
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    # ------------------------------------------------------------------------------------------------------- watching
    def deadline(self) -> float:
        """Seconds that what the process does now may take."""
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
                self._end(f"{where}, and was asked to stop, but has not in time")
            if others := self._told():
                self._end(f"{where}, and process {min(others, key=int)} hangs")

    def _tick(self) -> None:
        """Signs of life, for whoever looks: in the file and in the store."""
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

    def _told(self) -> set[str]:
        """The other processes that are ending because of a hang."""
        if not self._several:
            return set()
        with contextlib.suppress(TimeoutError, RuntimeError):
            return distributed.published(HANGS, seconds=STORE_SECONDS).keys() - {str(self._process)}
        return set()

    # --------------------------------------------------------------------------------------------------------- ending
    def _end(self, why: str) -> None:
        """Ends the process; it does not return."""
        # In a thread of its own, for any of it may block: a pipe nobody reads, a file system that is gone.
        report = threading.Thread(target=self._report, args=(why,), name="report", daemon=True)
        report.start()
        report.join(REPORT_SECONDS)
        os._exit(HUNG)

    def _report(self, why: str) -> None:
        said = [f"process {self._process} hangs: {why}"]
        for part in (
            self._tell,
            lambda: self._write_stacks(said[0] + "."),
            lambda: faulthandler.dump_traceback(file=sys.stderr, all_threads=True),
            lambda: _print(*(f"event: {row}" for row in read_events(self._run)[-LAST_EVENTS:])),
            lambda: said.append(self._who_is_behind()),
            lambda: self._record("; ".join(filter(None, said)) + "."),
        ):
            try:
                part()
            except Exception as error:  # whatever is broken, the rest is said, and the process ends
                _print(f"watchdog: {type(error).__name__}: {error}")
        distributed.leave(HUNG, seconds=5.0)

    def _tell(self) -> None:
        if self._several:
            self._publish()
            distributed.publish(f"{HANGS}/{self._process}", "", seconds=STORE_SECONDS)

    def _write_stacks(self, said: str) -> None:
        with (self._run.path / f"stacks-{self._process}.txt").open("a") as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {said}", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)

    def _who_is_behind(self) -> str:
        if not self._several:
            return ""
        try:
            before = distributed.published(SIGNS, seconds=STORE_SECONDS)
            time.sleep(2.5)  # a process that runs has published since
            after = distributed.published(SIGNS, seconds=STORE_SECONDS)
            ending = distributed.published(HANGS, seconds=STORE_SECONDS).keys()
        except TimeoutError:
            return "process 0, which keeps what all publish, does not answer: it is frozen, or gone"
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
    """What a process publishes of itself."""

    step: int
    phase: str
    still: float  # seconds that it had been there
    tick: int  # which sign it is: the next is another, while the process runs

    def text(self) -> str:
        """For the store; `of` is its inverse."""
        return f"{self.step} {self.phase} {self.still:.1f} {self.tick}"

    @classmethod
    def of(cls, text: str) -> "Sign":
        step, phase, still, tick = text.split()
        return cls(int(step), phase, float(still), int(tick))

    def where(self) -> str:
        return f"step {self.step} ({self.phase})"


def step_seconds(beats: Sequence[Beat]) -> list[float]:
    """How long each phase of the last hundred steps took, but for the last, which is not over."""
    first = beats[-1].step - STEPS
    return [
        after.since - before.since
        for before, after in itertools.pairwise(beats)
        if before.phase in STEP and before.step >= first
    ]


def behind(signs: dict[int, Sign], *, silent: set[int], count: int) -> str:
    """Whom the others of `count` processes wait for, by the last signs: the silent, or those at the lowest step."""
    if unheard := set(range(count)) - signs.keys():
        return f"nothing was ever heard of {_named(unheard)}"
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
