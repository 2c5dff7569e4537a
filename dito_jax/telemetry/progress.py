"""Progress display with the time left: a tqdm bar on a terminal, plain lines otherwise."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from tqdm import tqdm


INTERVAL = 10.0  # seconds between two lines of a ProgressMeter


class Progress:
    """Shows the step and a few metrics on stderr, out of `total` steps, from `step` on."""

    def __init__(self, total: int, *, step: int = 0, clock: Callable[[], float] = time.monotonic):
        self._total, self._clock = total, clock
        self._first, self._since = step, clock()
        self._bar = tqdm(total=total, initial=step, unit="step") if sys.stderr.isatty() else None

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the step, the values and the time left; called once per log interval."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is None:
            left = time_left(self._clock() - self._since, step - self._first, self._total - step)
            print(f"step {step}/{self._total}  {text}  {left} left", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def rewind(self, step: int) -> None:
        """Goes back to `step`, from which the run continues after a rollback."""
        self._first, self._since = step, self._clock()

    def close(self) -> None:
        """Closes the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.close()


class ProgressMeter:
    """Counts what is done of a longer task, such as the samples of an evaluation; a context manager.

    Without a terminal a thread prints one line every 10 seconds, so a short task prints nothing. The line has the time
    left, from what is done of `total` or else from `expected`, the seconds that the task took before; or, if nothing is
    known, the time so far. `beat` is called whenever something is done, to tell a watchdog of the progress. Nothing is
    shown where `shown` is False.
    """

    def __init__(
        self,
        task: str,
        total: int | None = None,
        *,
        unit: str = "images",
        expected: float | None = None,
        shown: bool = True,
        beat: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        interval: float = INTERVAL,
    ):
        self._task, self._total, self._unit, self._expected, self._beat = task, total, unit, expected, beat
        self._clock, self._since, self._done, self._interval = clock, clock(), 0, interval
        self._bar: Any = None
        if shown and total is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=task, unit=f" {unit}", leave=False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)
        self._prints = shown and self._bar is None

    def add(self, count: int) -> None:
        """Records that `count` more are done."""
        self._beat()
        self._done += count
        if self._bar is not None:
            self._bar.update(count)

    def line(self) -> str:
        """The task, what is done of it, and the time left."""
        seconds = self._clock() - self._since
        counted = "" if self._total is None else f" {self._done}/{self._total} {self._unit}"
        if self._total is not None and self._done:
            return f"{self._task}{counted}, {time_left(seconds, self._done, self._total - self._done)} left"
        if self._expected is not None and self._expected > seconds:
            return f"{self._task}{counted}, about {as_clock(self._expected - seconds)} left"
        return f"{self._task}{counted}, {as_clock(seconds)} so far"

    def _tell(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # stderr is closed
            while not self._ended.wait(self._interval):
                print(self.line(), file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if self._prints:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._prints:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()


type MakeMeter = Callable[..., ProgressMeter]  # ProgressMeter, or a partial of it


def time_left(seconds: float, done: int, left: int) -> str:
    """The time that `left` more take, as "1:05", if `done` took `seconds`; "?" if nothing is done yet."""
    return "?" if done <= 0 else as_clock(seconds / done * left)


def as_clock(seconds: float) -> str:
    """A duration as "1:05", or "2:01:05" with hours."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
