"""Preemption: graceful stop after SIGTERM or SIGUSR1 (Slurm, cloud), SIGINT (Ctrl-C) or SIGHUP, with a checkpoint.

Inside the training loop a signal sets a flag, and the loop checks after each step whether to save and stop. Outside
the loop, where nothing needs saving, `Preempted` is raised in the main thread at once. A second signal ends the
process immediately.

Several processes stop after the same step, which JAX determines: the first signal in any process is passed to JAX's
preemption service, and `reached_preemption_sync_point` returns True in all processes one step after the furthest.
JAX (jaxlib 0.11.2) handles SIGTERM only: its C handler sets a flag, which a thread polls once a second, and ignores
every later SIGTERM. The handlers here replace it for all these signals and call it once. If JAX cannot find a common
step, because a process is not in the loop, that process exits and informs the others.

Python runs signal handlers only when the main thread returns from C code, so never while it hangs in a collective.
Everything that must not wait for that (counting signals, calling JAX, ending the process) is done by threads, which
receive the signals through the wakeup pipe.
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


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
NUDGE = signal.SIGURG  # sent to the main thread to interrupt a sleep; ignored by default
TOGETHER = 0.2  # seconds in which signals count as one request: the terminal and a supervisor may both send one
STOPS = "stops"  # prefix in the key-value store: how each process reacts to a stop request
NEVER = float("inf")


class Preemption:
    """A context manager that handles stop signals; enter it in the main thread, after `distributed.join`.

    `grace_seconds` is the time between the signal and the kill by its sender. If there is nothing to save, the process
    is ended after nine tenths of that time, whatever it is blocked in. If there is something to save, a thread calls
    `on_request(grace_seconds)`: Watchdog.expect_within, which detects a save that hangs.
    """

    def __init__(self, grace_seconds: float, *, on_request: Callable[[float], None] = lambda seconds: None):
        self._grace, self._on_request = grace_seconds, on_request
        self._several = distributed.count() > 1
        self._asked = self._deferred = self._raised = False
        self._at_signal: dict[str, bool] = {}
        self._late = NEVER  # time.monotonic() at which a process with nothing to save is ended
        self._mine: str | None = None  # how this process reacts: "saves" or "leaves"
        self._entered, self._news = threading.Event(), threading.Event()

    @property
    def asked(self) -> bool:
        """Whether this process knows of a stop signal; processes may learn of it at different times."""
        return self._asked

    def requested(self, step: int) -> bool:
        """Whether to save and stop after `step`; a collective: all processes must call it after every step."""
        if not self._several:
            return self._asked
        if reached := multihost_utils.reached_preemption_sync_point(step):
            self._learn("another process", saves=True)
        return reached

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block a signal only sets a flag; Preempted is raised at the end of the block if it is set."""
        self._raised = False  # whoever comes here after a signal has lost the exception
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
        # nohup ignores SIGHUP, and that is kept.
        handled = [n for n in (*SIGNALS, NUDGE) if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before: dict[int, Any] = {n: signal.signal(n, self._on_signal) for n in handled}
        os.register_at_fork(after_in_child=self._restore)  # a forked child must not use the parent's pipe
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
        self._entered.set()
        targets = (self._listen, self._confer) if self._several else (self._listen,)
        self._threads = [threading.Thread(target=target, name="preemption", daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Raises Preempted instead of an error that was caused by the stop of another process (a failed collective)."""
        # JAX's C handler is not restored: it would ignore a SIGTERM, since nothing asks for its step any more.
        self._restore()
        os.write(self._writer, b"\0")
        for thread in self._threads:  # the listener first: signals that it received are still published
            thread.join()
            self._news.set()
        os.close(self._reader)
        os.close(self._writer)
        if self._several and isinstance(error, Exception) and not isinstance(error, Preempted):
            with contextlib.suppress(TimeoutError, RuntimeError):
                if left := distributed.published(STOPS).keys() - {str(distributed.index())}:
                    raise Preempted(
                        f"stopped because process {min(left)} was preempted; run the same command to continue."
                    ) from error

    def _restore(self) -> None:
        if self._entered.is_set():
            self._entered.clear()
            signal.set_wakeup_fd(self._wakeup)
            sys.unraisablehook = self._unraisable
            for number, handler in self._before.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------------------------------------------ the main thread
    def _on_signal(self, _number: int, _frame: Any) -> None:
        self._saves()
        self._asked = True
        if not self._deferred:
            self._raise_if_asked()

    def _on_unraisable(self, unraisable: Any) -> None:
        """Python drops an exception that is raised in a __del__ or in a callback of the garbage collector."""
        if isinstance(unraisable.exc_value, Preempted):
            self._raised = False  # the listener interrupts the main thread again
        else:
            self._unraisable(unraisable)

    def _saves(self) -> bool:
        """Whether there was something to save at the first signal; set by the first thread that handles it."""
        return self._at_signal.setdefault("saves", self._deferred)

    def _raise_if_asked(self) -> None:
        if self._asked and not self._raised:
            self._raised = True
            raise Preempted("stopped after a stop signal; run the same command to continue.")

    # ---------------------------------------------------------------------------------------------- the other threads
    def _listen(self) -> None:
        """Counts signals; ends the process at the second one, or after the grace time with nothing to save."""
        first = NEVER
        while self._entered.is_set():
            if not select.select([self._reader], [], [], self._patience())[0]:
                if time.monotonic() >= self._late:
                    self._say("did not stop in time: ending the process, nothing to save.")
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
                    self._say(f"{name} again: ending now; run the same command to continue from the last checkpoint.")
                    os._exit(128 + number)

    def _patience(self) -> float | None:
        """Seconds that the listener waits for a signal; None: without limit."""
        asleep = self._asked and not (self._deferred or self._raised)
        wait = min(self._late - time.monotonic(), 1.0 if asleep else NEVER)
        return None if wait == NEVER else max(0.0, wait)

    def _nudge(self) -> None:
        """Interrupts the main thread, in case the signal came just before it entered a sleeping call."""
        signal.pthread_kill(threading.main_thread().ident or 0, NUDGE)

    def _begin(self, name: str, *, saves: bool) -> None:
        """Handles the first signal: prints a line, informs JAX and the other processes, sets the deadline."""
        what = "saving after a step, then stopping" if saves else "nothing to save, stopping now"
        self._say(f"{name}: {what}, within {self._grace:g} s; a second signal ends the process at once.")
        if self._of_jax:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(self._of_jax)(signal.SIGTERM)
        self._asked, self._mine = True, "saves" if saves else "leaves"
        self._news.set()
        self._hurry(saves=saves)

    def _learn(self, who: str, *, saves: bool) -> None:
        known, self._asked = self._asked, True
        if not known:
            self._say(f"{who} was preempted: this process stops too, within {self._grace:g} s.")
        if not (known and saves):
            self._hurry(saves=saves)

    def _hurry(self, *, saves: bool) -> None:
        if saves:
            self._on_request(self._grace)
        else:
            self._late = min(self._late, time.monotonic() + 0.9 * self._grace)

    def _confer(self) -> None:
        """Publishes this process's reaction and reads those of the others, once a second."""
        published, known, entered = None, set[str](), True
        while entered:
            self._news.wait(1.0)
            self._news.clear()
            entered = self._entered.is_set()
            with contextlib.suppress(TimeoutError, RuntimeError):  # if process 0, which holds the store, has ended
                if self._mine != published:
                    distributed.publish(f"{STOPS}/{distributed.index()}", self._mine or "")
                    published = self._mine
                stops = distributed.published(STOPS) if entered else {}
                for number in sorted(stops.keys() - known - {str(distributed.index())}):
                    known.add(number)
                    self._heard(number, stops[number])

    def _heard(self, number: str, what: str) -> None:
        """Reacts to the preemption of another process: if that one saves, this one stops at the same step; if that one
        left, nothing can be saved any more."""
        if not self._entered.is_set():
            return
        self._learn(f"process {number}", saves=what == "saves" and self._deferred)
        # Wakes the listener through the pipe, to use the new deadline, and interrupts the main thread if it sleeps.
        self._nudge()

    def _say(self, line: str) -> None:
        who = f"process {distributed.index()}: " if self._several else ""
        with contextlib.suppress(OSError):  # the terminal is closed
            print(who + line, file=sys.stderr, flush=True)


def _take_c_handler(number: int) -> int | None:
    """Returns the address of the C handler of a signal, if there is one; the signal is ignored from here on."""
    install = ctypes.CDLL(None).signal
    install.restype, install.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    address = install(number, int(signal.SIG_IGN))
    return None if address in (None, int(signal.SIG_DFL), int(signal.SIG_IGN)) else address
