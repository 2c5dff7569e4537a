"""Supervisor: starts the processes of a run and restarts them after failures (like torchrun --max-restarts).

It does not restart after exit code 0 (finished) and exit code 2 (usage error: the same command would fail again), nor
after 75 (preempted) if the supervisor itself was asked to stop; if only a process was, it restarts at once. After every
other end (a crash, a signal, the watchdog's 86) it restarts after a pause, from the last good checkpoint. A worker that
causes failures repeatedly (blame.py) is lost, and the run continues with fewer workers (elastic downscaling). The
supervisor gives up after several failures in a row at one step, and if a process does not end after SIGKILL.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dito_jax.errors import DONE, HUNG, PREEMPTED, USER_MISTAKE, UserError
from dito_jax.resilience.attempt import Attempt, End, Limits
from dito_jax.resilience.blame import Evidence, Verdict, verdict
from dito_jax.resilience.workers import Worker
from dito_jax.telemetry.events import Events
from dito_jax.telemetry.heartbeat import Beat, read_beat
from dito_jax.telemetry.run_directory import RunDirectory


# The signals that are passed on, and what the processes get: a closed terminal is a request to stop and save.
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1, signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Patience:
    """Limits and pauses of the supervisor."""

    grace: float = 15.0  # seconds from the failure of one process until the others are killed
    stop: float = 120.0  # seconds from a stop signal until processes are killed; more than watchdog.grace_seconds
    kill: float = 30.0  # seconds from SIGKILL until a process that has not ended is given up
    pause: float = 1.0  # seconds before a restart, doubled after each failure without progress
    longest_pause: float = 60.0  # upper limit of the pause in seconds
    loop: int = 3  # number of failures in a row at one step after which the supervisor gives up
    lost: int = 2  # number of failures in a row caused by one worker, without progress, after which it is lost


@dataclasses.dataclass(frozen=True)
class Failure:
    """What ended an attempt."""

    worker: Worker  # of the process that `end` is about: the cause, if it has ended itself, else the first to end
    step: int  # the step it had reached
    end: End
    cause: Worker | None  # the worker that caused the failure, as far as known
    because: str  # a clause that says what was found, if that is not `end`

    def words(self) -> str:
        """One clause for messages: process, worker, host, step, exit code, and the cause."""
        ended = f"process {self.end.process} ({self.worker.words()}) ended at step {self.step} by {self.end.words()}"
        return f"{ended}; {self.because}" if self.because else ended


class Supervisor:
    """Supervises one run.

    `shrink(left)` returns how the run continues with `left` workers: the number of processes it uses, and options to
    add to the command. It raises UserError if the run cannot continue.
    """

    def __init__(
        self,
        command: Sequence[str],
        run: RunDirectory,
        workers: Sequence[Worker],
        shrink: Callable[[int], tuple[int, list[str]]],
        *,
        remote_shell: str = "ssh",
        patience: Patience = Patience(),
    ):
        self._command, self._run, self._places, self._shrink = list(command), run, list(workers), shrink
        self._remote_shell, self._patience = remote_shell, patience
        self._events = Events(run)
        self._failures: list[Failure] = []
        self._attempt: Attempt | None = None
        self._at_failure: list[Beat | None] = []  # heartbeats when the first process of the attempt had failed
        self._stop_requested = False
        self._held: list[int] = []  # signals received while no process was running
        self._writing = threading.Lock()

    def supervise(self) -> int:
        """Supervises the run until it ends or fails for good; returns the exit code."""
        used, added, pause, number = len(self._places), [], self._patience.pause, 0
        with self._forwarding():
            while not self._stop_requested:
                number += 1
                began = time.time()
                ends = self._start([*self._command, *added], used, number).wait()
                self._attempt = None
                failed = [end for end in ends if end.code]
                if not failed:
                    return DONE
                if stuck := [end for end in ends if end.stuck]:
                    return self._leave_behind(stuck)
                if any(end.code == USER_MISTAKE for end in failed):
                    return USER_MISTAKE
                if self._stop_requested:
                    return max((_code(end) for end in failed if end.code != PREEMPTED), default=PREEMPTED)
                if failed[0].code == PREEMPTED:
                    self._say(
                        "restart", f"process {failed[0].process} was preempted, but the supervisor was not: restarting."
                    )
                    continue
                failure = self._failure(ends, began)
                progress = not self._failures or failure.step > self._failures[-1].step
                pause = self._patience.pause if progress else min(2 * pause, self._patience.longest_pause)
                self._failures.append(failure)
                if self._makes_no_progress():
                    return self._give_up(failure)
                if self._worker_failed_repeatedly():
                    used, added = self._without(failure)
                self._say("restart", f"{failure.words()}; restarting in {pause:g} s.", code=failure.end.code)
                self._rest(pause)
        return PREEMPTED

    def _start(self, command: list[str], used: int, number: int) -> Attempt:
        attempt = Attempt(
            command, self._places[:used], number,
            remote_shell=self._remote_shell, on_line=self._on_line, on_failure=self._note_beats,
            limits=Limits(self._patience.grace, self._patience.stop, self._patience.kill),
        )  # fmt: skip
        self._attempt = attempt
        while self._held:
            attempt.signal(self._held.pop(0))
        return attempt

    def _rest(self, seconds: float) -> None:
        """Sleeps; returns early after a stop signal."""
        # No threading.Event: a signal handler that sets it could deadlock on the lock that this thread holds.
        until = time.monotonic() + seconds
        while not self._stop_requested and time.monotonic() < until:
            time.sleep(0.02)

    def _note_beats(self) -> None:
        self._at_failure = [read_beat(self._run.heartbeats / str(index)) for index in range(len(self._places))]

    def _failure(self, ends: list[End], began: float) -> Failure:
        """The failure that ended the attempt, and the worker that caused it."""
        found = [self._evidence(end, began) for end in ends]
        cause: Verdict = verdict(found)
        first = next(each for each in found if each.end.code)
        of_cause = next((each for each in found if each.end.process == cause.process), first)
        told = first if of_cause.end.killed else of_cause
        return Failure(
            self._places[told.end.process], told.step, told.end,
            cause=None if cause.process is None else self._places[cause.process],
            because="" if cause.process == told.end.process else cause.because,
        )  # fmt: skip

    def _evidence(self, end: End, began: float) -> Evidence:
        """What is known of a process at the end of an attempt that began at the time `began`."""
        beat, before = self._beat(end.process, began), self._at_failure[end.process]
        alive = None
        if end.state in ("T", "t"):
            alive = False
        elif self._places[end.process].host is not None:
            alive = end.state is not None  # by the launcher on its host: heartbeat files of other hosts arrive late
        elif beat.phase != "init" or beat.alive > began:
            alive = before is None or beat.alive != before.alive
        return Evidence(end, beat.step, beat.phase, alive)

    def _beat(self, process: int, began: float) -> Beat:
        """The last heartbeat of a process in this attempt."""
        beat = read_beat(self._run.heartbeats / str(process))
        return beat if beat is not None and beat.alive >= began else Beat(0, "init", began, began)

    def _makes_no_progress(self) -> bool:
        latest = self._failures[-self._patience.loop :]
        return len(latest) == self._patience.loop and len({failure.step for failure in latest}) == 1

    def _worker_failed_repeatedly(self) -> bool:
        """Whether one worker caused all of the latest failures, without progress from the first to the last."""
        latest = self._failures[-self._patience.lost :]
        return (
            len(self._places) > 1
            and len(latest) == self._patience.lost
            and latest[0].cause is not None
            and len({failure.cause for failure in latest}) == 1
            and latest[-1].step <= latest[0].step
        )

    def _without(self, failure: Failure) -> tuple[int, list[str]]:
        """Removes the lost worker; returns the number of processes to use and the options to add."""
        lost, before = failure.cause, len(self._places)
        assert lost is not None
        self._places.remove(lost)
        try:
            used, added = self._shrink(len(self._places))
        except UserError as error:  # the caller prints the error itself
            self._log(f"supervisor: {failure.words()}; worker {lost.slot} is lost. {error}")
            raise
        idle = f", {len(self._places) - used} idle" if used < len(self._places) else ""
        said = f"worker {lost.slot} is lost: continuing with {used} of {before} processes{idle} ({' '.join(added)})."
        self._say("worker_lost", said, slot=lost.slot, processes=used)
        return used, added

    def _give_up(self, failure: Failure) -> int:
        said = (
            f"{failure.words()}: failure {self._patience.loop} in a row at this step, so it is not restarted; "
            f"{self._run.supervision} has its output."
        )
        self._say("gave_up", said, code=failure.end.code)
        return _code(failure.end)

    def _leave_behind(self, stuck: list[End]) -> int:
        """Gives up: a process that does not end may hold the devices and the lock of the run."""
        of = ", ".join(f"process {end.process} ({self._places[end.process].words()})" for end in stuck)
        said = (
            f"{of} did not end within {self._patience.kill:g} s after SIGKILL: it waits for a device or a file system "
            "(state D in ps). The run is not restarted while it is there: check that host, then run the same command."
        )
        self._say("gave_up", said, code=HUNG)
        return HUNG

    def _on_line(self, line: str) -> None:
        """Writes a line of a process's output to the terminal and to supervise.log."""
        with self._writing:
            with contextlib.suppress(OSError):  # the terminal is closed
                print(line, file=sys.stderr, flush=True)
            self._log(line)

    def _say(self, event: str, said: str, **values: Any) -> None:
        with self._writing:
            self._events.record(event, f"supervisor: {said}", **values)
            self._log(f"supervisor: {said}")

    def _log(self, line: str) -> None:
        self._run.path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError), self._run.supervision.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Forwards signals to the processes; after the first signal nothing is restarted."""

        def forward(number: int, _: Any) -> None:
            number = signal.Signals(number)
            self._stop_requested = True
            if self._attempt is None:
                self._held.append(FORWARDED[number])
            else:
                self._attempt.signal(FORWARDED[number])

        # nohup ignores SIGHUP, and that is kept.
        numbers = [n for n in FORWARDED if (n, signal.getsignal(n)) != (signal.SIGHUP, signal.SIG_IGN)]
        before = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _code(end: End) -> int:
    """The exit code as a shell reports it: 128 + signal number for a signal."""
    return end.code if end.code >= 0 else 128 - end.code
