"""Heartbeat file of a process: step, phase, time of the last progress and time when it was last alive.

The heartbeat is 32 bytes, which one system call writes. The last one survives a kill of the process at any moment, so
the next start knows when and where the process ended. A file that is truncated or deleted meanwhile, or a disk that
does not answer, is no reason to end the process.
"""

import collections
import contextlib
import dataclasses
import math
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path


PHASES = ("init", "compile", "data", "step", "eval", "save", "restore", "done")
RECORD = struct.Struct("<qqdd")  # step, index of the phase, since, alive
ALIVE = struct.Struct("<d")
RECENT = 256  # number of beats in memory: enough for 100 steps with two phases each, and some saves


@dataclasses.dataclass(frozen=True)
class Beat:
    """One heartbeat; times are in seconds since 1970, by the clock of the run."""

    step: int  # the current step; 0 before the first
    phase: str  # one of PHASES
    since: float  # time of the last progress to another step or phase
    alive: float  # time when the process was last alive
    began: float = dataclasses.field(default=0.0, compare=False)  # time.monotonic of the phase's begin; not in the file


class Heartbeat:
    """Writes the heartbeat file of one process.

    `clock` is that of the times in the file. Durations are measured by `monotonic`.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._clock, self._monotonic = clock, monotonic
        self.recent: collections.deque[Beat] = collections.deque(maxlen=RECENT)
        self.beat(0, "init")

    @property
    def last(self) -> Beat:
        """The current heartbeat."""
        return dataclasses.replace(self.recent[-1], alive=self._alive)

    def beat(self, step: int, phase: str) -> None:
        """Records progress to a step and phase, or within them."""
        self._alive = now = self._clock()
        last = self.recent[-1] if self.recent else None
        if last and (last.step, last.phase) == (step, phase):
            # A long phase with much progress does not push the steps out of memory.
            self.recent[-1] = Beat(step, phase, now, now, last.began)
        else:
            self.recent.append(Beat(step, phase, now, now, self._monotonic()))
        self._write(RECORD.pack(step, PHASES.index(phase), now, now), 0)

    def alive(self) -> None:
        """Records that the process is alive, without progress; any thread may call it."""
        # Writes only this field, so that a concurrent beat of another thread is not overwritten.
        self._alive = self._clock()
        self._write(ALIVE.pack(self._alive), RECORD.size - ALIVE.size)

    def close(self) -> None:
        """Closes the file; the last heartbeat stays in it."""
        file, self._file = self._file, -1
        os.close(file)

    def _write(self, content: bytes, offset: int) -> None:
        with contextlib.suppress(OSError):
            os.pwrite(self._file, content, offset)


def read_beat(path: Path) -> Beat | None:
    """The last heartbeat in a file; None if there is none, or if it is truncated or damaged."""
    try:
        step, phase, since, alive = RECORD.unpack(path.read_bytes())
    except (OSError, struct.error):
        return None
    sound = step >= 0 <= phase < len(PHASES) and math.isfinite(since) and math.isfinite(alive) and alive > 0
    return Beat(step, PHASES[phase], since, alive) if sound else None
