"""Keeps a run going: starts it, and starts it again when it ends before its time.

Exit code 0 ends it, and 2, the user's mistake: the same command would fail again. 75, when the supervisor was asked to
stop; a process that was preempted alone goes on at once. After everything else (a crash, a signal, the watchdog's 86)
the run starts again after a pause, from its last good checkpoint, and in fewer places when one of them is lost. It ends
when it does not get beyond one step.
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
from dito_jax.resilience.attempt import Attempt, End, Place
from dito_jax.telemetry.events import Events
from dito_jax.telemetry.heartbeat import Beat, read_beat
from dito_jax.telemetry.run_directory import RunDirectory


FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long the supervisor bears with what."""

    grace: float = 15.0  # seconds that the others have to end when one process has failed
    pause: float = 1.0  # seconds before the next start, twice as many after each failure without progress
    longest_pause: float = 60.0
    loop: int = 3  # failures in a row at one step: it gives up
    lost: int = 2  # starts in a row that one place spoiled without getting further: it goes on without the place


@dataclasses.dataclass(frozen=True)
class Failure:
    """What ended an attempt."""

    place: Place  # the one that is to blame
    step: int  # its step
    end: End

    def words(self) -> str:
        """For a person."""
        where = f"place {self.place.slot}" + (f" on {self.place.host}" if self.place.host else "")
        return f"process {self.end.process} ({where}) ended at step {self.step} by {self.end.words()}"


class Supervisor:
    """Of one run.

    `shrink(left)` says how the run goes on with so many processes: how many of them it uses, and options to add to the
    command; it raises UserError if it cannot.
    """

    def __init__(
        self,
        command: Sequence[str],
        run: RunDirectory,
        places: Sequence[Place],
        shrink: Callable[[int], tuple[int, list[str]]],
        *,
        remote_shell: str = "ssh",
        patience: Patience = Patience(),
    ):
        self._command, self._run, self._places, self._shrink = list(command), run, list(places), shrink
        self._remote_shell, self._patience = remote_shell, patience
        self._events = Events(run)
        self._failures: list[Failure] = []
        self._attempt: Attempt | None = None
        self._asked = False
        self._held: list[int] = []  # signals that came while no process could be told
        self._writing = threading.Lock()

    def supervise(self) -> int:
        """Runs the run to its end; returns the exit code."""
        used, added, pause, number = len(self._places), [], self._patience.pause, 0
        with self._forwarding():
            while not self._asked:
                number += 1
                began = time.time()
                ends = self._start([*self._command, *added], used, number).wait()
                self._attempt = None
                failed = [end for end in ends if end.code]
                if not failed:
                    return DONE
                if any(end.code == USER_MISTAKE for end in failed):
                    return USER_MISTAKE
                if self._asked:
                    return max((_code(end) for end in failed if end.code != PREEMPTED), default=PREEMPTED)
                if failed[0].code == PREEMPTED:
                    self._say(
                        "restart", f"process {failed[0].process} was asked to stop, the supervisor not: on it goes."
                    )
                    continue
                failure = self._failure(failed, began)
                progress = not self._failures or failure.step > self._failures[-1].step
                pause = self._patience.pause if progress else min(2 * pause, self._patience.longest_pause)
                self._failures.append(failure)
                if self._loops():
                    return self._give_up(failure)
                if self._spoils():
                    used, added = self._without(failure)
                self._say("restart", f"{failure.words()}; it starts again in {pause:g} s.", code=failure.end.code)
                self._rest(pause)
        return PREEMPTED

    def _start(self, command: list[str], used: int, number: int) -> Attempt:
        attempt = Attempt(
            command, self._places[:used], number,
            remote_shell=self._remote_shell, tell=self._tell, grace=self._patience.grace,
        )  # fmt: skip
        self._attempt = attempt
        while self._held:
            attempt.signal(self._held.pop(0))
        return attempt

    def _rest(self, seconds: float) -> None:
        """Sleeps, but not on after a signal."""
        # An Event would be set by the handler while this thread may hold the Event's own lock.
        until = time.monotonic() + seconds
        while not self._asked and time.monotonic() < until:
            time.sleep(0.02)

    def _failure(self, failed: list[End], began: float) -> Failure:
        """Whoever failed first is to blame; of processes that hung, the one that is behind."""
        beats = {end.process: self._beat(end.process, began) for end in failed}
        first = failed[0]
        if first.code == HUNG:
            first = min(failed, key=lambda end: beats[end.process].step)
        return Failure(self._places[first.process], beats[first.process].step, first)

    def _beat(self, process: int, began: float) -> Beat:
        """Its last sign of life in this attempt."""
        beat = read_beat(self._run.heartbeats / str(process))
        return beat if beat is not None and beat.alive >= began else Beat(0, "init", began, began)

    def _loops(self) -> bool:
        latest = self._failures[-self._patience.loop :]
        return len(latest) == self._patience.loop and len({failure.step for failure in latest}) == 1

    def _spoils(self) -> bool:
        """Whether one place is to blame for the latest failures, and did not get further in the last of them."""
        latest = self._failures[-self._patience.lost :]
        return (
            len(self._places) > 1
            and len(latest) == self._patience.lost
            and len({failure.place for failure in latest}) == 1
            and latest[-1].step <= latest[0].step
        )

    def _without(self, failure: Failure) -> tuple[int, list[str]]:
        """Goes on in the other places."""
        lost, before = failure.place, len(self._places)
        self._places.remove(lost)
        try:
            used, added = self._shrink(len(self._places))
        except UserError as error:  # the command prints it
            self._log(f"supervisor: {failure.words()}; place {lost.slot} is lost. {error}")
            raise
        idle = f", {len(self._places) - used} idle" if used < len(self._places) else ""
        said = f"place {lost.slot} is lost: the run goes on in {used} of {before} processes{idle} ({' '.join(added)})."
        self._say("place_lost", said, slot=lost.slot, processes=used)
        return used, added

    def _give_up(self, failure: Failure) -> int:
        said = (
            f"{failure.words()}, for the {self._patience.loop}. time in a row at this step: it is not started "
            f"again; {self._run.supervision} has its output."
        )
        self._say("gave_up", said, code=failure.end.code)
        return _code(failure.end)

    def _tell(self, line: str) -> None:
        """A line of a process's output: to the terminal, and to the log."""
        with self._writing:
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
        """Signals go to the processes; after the first nothing is started again."""

        def forward(number: int, _: Any) -> None:
            self._asked = True
            if self._attempt is None:
                self._held.append(number)
            else:
                self._attempt.signal(number)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _code(end: End) -> int:
    """As a shell would have it."""
    return end.code if end.code >= 0 else 128 - end.code


def places(processes: int, hosts: Sequence[str]) -> list[Place]:
    """`processes` on this machine, or one on each host; a host may be named more than once."""
    if hosts and processes != 1:
        raise UserError("supervise: give --processes for this machine, or --hosts, not both.")
    if processes < 1:
        raise UserError(f"supervise: --processes {processes}: wanted at least 1.")
    return [Place(slot, host) for slot, host in enumerate(hosts or [None] * processes)]
