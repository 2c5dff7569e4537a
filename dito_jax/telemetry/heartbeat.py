"""Heartbeat file of a process: step, phase, time of the last progress and time when it was last alive.

The heartbeat is 32 bytes in a memory-mapped file. An update costs as much as an assignment, and the last one survives
a kill at any moment, so the next start knows when and where the process ended.
"""

import collections
import dataclasses
import mmap
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
    """One heartbeat; times are in seconds since 1970."""

    step: int  # the current step; 0 before the first
    phase: str  # one of PHASES
    since: float  # time of the last progress to another step or phase
    alive: float  # time when the process was last alive


class Heartbeat:
    """Writes the heartbeat file of one process."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(RECORD.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), RECORD.size)
        self._clock = clock
        self.recent: collections.deque[Beat] = collections.deque(maxlen=RECENT)
        self.beat(0, "init")

    @property
    def last(self) -> Beat:
        """The current heartbeat."""
        return dataclasses.replace(self.recent[-1], alive=self._alive)

    def beat(self, step: int, phase: str) -> None:
        """Records progress to a step and phase, or within them."""
        self._alive = now = self._clock()
        beat = Beat(step, phase, now, now)
        if self.recent and (self.recent[-1].step, self.recent[-1].phase) == (step, phase):
            self.recent[-1] = beat  # a long phase with much progress does not push the steps out
        else:
            self.recent.append(beat)
        self._map[:] = RECORD.pack(step, PHASES.index(phase), now, now)

    def alive(self) -> None:
        """Records that the process is alive, without progress; any thread may call it."""
        # Writes only this field, so that a concurrent beat of another thread is not overwritten.
        self._alive = self._clock()
        ALIVE.pack_into(self._map, RECORD.size - ALIVE.size, self._alive)

    def close(self) -> None:
        """Closes the mapping; the last heartbeat stays in the file."""
        self._map.close()


def read_beat(path: Path) -> Beat | None:
    """The last heartbeat in a file; None if there is none."""
    try:
        step, phase, since, alive = RECORD.unpack(path.read_bytes())
    except (FileNotFoundError, struct.error):
        return None
    return Beat(step, PHASES[phase], since, alive) if alive else None
