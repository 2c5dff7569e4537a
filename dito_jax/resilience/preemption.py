"""Stopping when asked to: by Slurm or a cloud (SIGTERM, SIGUSR1), or by a person (SIGINT, Ctrl-C).

Where there is something to save, in the training loop, a signal is noted, and the loop asks after each step whether
to save and stop. Everywhere else, where a stop loses nothing, `Preempted` is raised in the main thread at once. A
second signal ends the process.

Several processes stop after the same step, which JAX finds: the first signal of any of them tells its preemption
service, and `reached_preemption_sync_point` is true in all of them one step after the furthest. JAX (jaxlib 0.11.2)
hears SIGTERM alone: a C handler sets a flag, which a thread reads once a second, and swallows every later SIGTERM.
So ours take its place, for all three signals, and call it once. Where it would find no step, because a process was
not in the loop, that process leaves, and tells the others.

Python runs a handler only when the main thread is back from C: never, if that hangs in a collective. What must not
wait for it (counting signals, telling JAX, ending the process) is done by threads, which hear of signals by a pipe.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental import multihost_utils

from dito_jax import distributed
from dito_jax.errors import PREEMPTED, Preempted


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
NUDGE = signal.SIGURG  # what a thread sends to the main thread; ignored wherever nobody listens
TOGETHER = 0.2  # seconds: a terminal and a supervisor pass on one request, each its own signal
STOPS = "stops"  # where the store has what each process does about a request
NEVER = float("inf")


class Preemption:
    """Notes the signals that ask for a stop, while it is entered; in the main thread, after `distributed.join`.

    `grace_seconds` is how long after a signal the process may live, as its sender said. With nothing to save, the
    process is ended when nine tenths of it are over, whatever it is stuck in. With something to save, `on_request`
    is called with it, in a thread: Watchdog.expect_within, so that a save that hangs is seen.
    """

    def __init__(self, grace_seconds: float, *, on_request: Callable[[float], None] = lambda seconds: None):
        self._grace, self._on_request = grace_seconds, on_request
        self._several = distributed.count() > 1
        self._asked = self._deferred = self._raised = False
        self._at_signal: dict[str, bool] = {}
        self._late = NEVER  # when a process with nothing to save is ended, by time.monotonic
        self._mine: str | None = None  # what this process does: "saves", "leaves"
        self._entered, self._news = threading.Event(), threading.Event()

    def requested(self, step: int) -> bool:
        """Between steps: is it time to save and stop? Several processes all ask at every step, and agree."""
        if not self._several:
            return self._asked
        if reached := multihost_utils.reached_preemption_sync_point(step):
            self._learn("another process", saves=True)
        return reached

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted; Preempted is raised on leaving it if one was."""
        self._raise_if_asked()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self._raise_if_asked()

    def __enter__(self) -> "Preemption":
        self._of_jax = _take_c_handler(signal.SIGTERM) if self._several else None
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before: dict[int, Any] = {n: signal.signal(n, self._on_signal) for n in (*SIGNALS, NUDGE)}
        os.register_at_fork(after_in_child=self._restore)  # a child's signals are not for its parent
        self._entered.set()
        targets = (self._listen, self._confer) if self._several else (self._listen,)
        self._threads = [threading.Thread(target=target, name="preemption", daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Raises Preempted in place of an error that comes of another process's stop: of a collective without it."""
        # JAX's C handler does not come back: it would swallow a SIGTERM, and nobody asks for its step any more.
        self._restore()
        os.write(self._writer, b"\0")
        for thread in self._threads:  # the listener first: what it hears is still told to the others
            thread.join()
            self._news.set()
        os.close(self._reader)
        os.close(self._writer)
        if self._several and isinstance(error, Exception) and not isinstance(error, Preempted):
            with contextlib.suppress(TimeoutError, RuntimeError):
                if left := distributed.published(STOPS).keys() - {str(distributed.index())}:
                    raise Preempted(
                        f"stopped, as process {min(left)} was asked to; the same command goes on."
                    ) from error

    def _restore(self) -> None:
        if self._entered.is_set():
            self._entered.clear()
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------------------------------------------ the main thread
    def _on_signal(self, _number: int, _frame: Any) -> None:
        self._saves()
        self._asked = True
        if not self._deferred:
            self._raise_if_asked()

    def _saves(self) -> bool:
        """Whether there was something to save at the first signal; the first thread that hears of it decides."""
        return self._at_signal.setdefault("saves", self._deferred)

    def _raise_if_asked(self) -> None:
        if self._asked and not self._raised:
            self._raised = True
            raise Preempted("stopped, as asked to; the same command goes on.")

    # ---------------------------------------------------------------------------------------------- the other threads
    def _listen(self) -> None:
        """Counts the signals; ends the process at the second, or when it is late with nothing to save."""
        first = NEVER
        while self._entered.is_set():
            if not select.select([self._reader], [], [], self._patience())[0]:
                if time.monotonic() >= self._late:
                    self._say("still not stopped: ended, with nothing to save.")
                    distributed.leave(PREEMPTED, seconds=0.1 * self._grace)
                self._nudge()
                continue
            for number in os.read(self._reader, 64):
                if number not in SIGNALS:
                    continue
                name = signal.Signals(number).name
                if first == NEVER:
                    first = time.monotonic()
                    self._begin(name, saves=self._saves())
                elif time.monotonic() - first > TOGETHER:
                    self._say(f"{name} again: ended now; the same command goes on from the last checkpoint.")
                    os._exit(128 + number)

    def _patience(self) -> float | None:
        """Seconds until the listener acts though it heard nothing; None: for ever."""
        asleep = self._asked and not (self._deferred or self._raised)
        wait = min(self._late - time.monotonic(), 1.0 if asleep else NEVER)
        return None if wait == NEVER else max(0.0, wait)

    def _nudge(self) -> None:
        """Wakes the main thread: a signal does not, if it came just before a call that sleeps."""
        signal.pthread_kill(threading.main_thread().ident or 0, NUDGE)

    def _begin(self, name: str, *, saves: bool) -> None:
        """What the first signal sets off."""
        what = "saves after a step and stops" if saves else "has nothing to save and stops now"
        self._say(f"{name}: {what}, within {self._grace:g} s; a second signal ends it at once.")
        if self._of_jax:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(self._of_jax)(signal.SIGTERM)
        self._asked, self._mine = True, "saves" if saves else "leaves"
        self._news.set()
        self._hurry(saves=saves)

    def _learn(self, who: str, *, saves: bool) -> None:
        known, self._asked = self._asked, True
        if not known:
            self._say(f"{who} was asked to stop: so does this one, within {self._grace:g} s.")
        if not (known and saves):
            self._hurry(saves=saves)

    def _hurry(self, *, saves: bool) -> None:
        if saves:
            self._on_request(self._grace)
        else:
            self._late = min(self._late, time.monotonic() + 0.9 * self._grace)

    def _confer(self) -> None:
        """Tells the others of a signal, and hears of theirs; within a second."""
        told, known, entered = None, set[str](), True
        while entered:
            self._news.wait(1.0)
            self._news.clear()
            entered = self._entered.is_set()
            with contextlib.suppress(TimeoutError, RuntimeError):  # of a store that is gone, as the run will be
                if self._mine != told:
                    distributed.publish(f"{STOPS}/{distributed.index()}", self._mine or "")
                    told = self._mine
                stops = distributed.published(STOPS) if entered else {}
                for number in sorted(stops.keys() - known - {str(distributed.index())}):
                    known.add(number)
                    self._heard(number, stops[number])

    def _heard(self, number: str, what: str) -> None:
        """Another process was asked to stop: one that saves waits for this one's step; without one that left, nothing
        more can be saved."""
        if not self._entered.is_set():
            return
        self._learn(f"process {number}", saves=what == "saves" and self._deferred)
        # Through the pipe the listener hears of a new deadline, by the signal the main thread, if it sleeps.
        self._nudge()

    def _say(self, line: str) -> None:
        who = f"process {distributed.index()}: " if self._several else ""
        print(who + line, file=sys.stderr, flush=True)


def _take_c_handler(number: int) -> int | None:
    """The address of the C function that handles a signal; the signal is ignored from here on."""
    install = ctypes.CDLL(None).signal
    install.restype, install.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    address = install(number, int(signal.SIG_IGN))
    return None if address in (None, int(signal.SIG_DFL), int(signal.SIG_IGN)) else address
