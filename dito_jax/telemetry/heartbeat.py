"""Where a process of a run is: its step, its phase, since when, and when it was last alive.

Thirty-two bytes in a file that is mapped into memory. A beat costs as much as an assignment, and outlives a process
that is killed at any moment, so that whoever starts next knows when and where the last one died.
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
RECENT = 256  # beats that are remembered: a hundred steps of data and step, and some saves


@dataclasses.dataclass(frozen=True)
class Beat:
    """A sign of life; times are seconds since 1970."""

    step: int  # the one being worked on; 0 before the first
    phase: str  # one of PHASES
    since: float  # when it last went on: to another step or phase
    alive: float  # when its process last ran at all


class Heartbeat:
    """The writer of one process's beats."""

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
        """Where the process is."""
        return dataclasses.replace(self.recent[-1], alive=self._alive)

    def beat(self, step: int, phase: str) -> None:
        """The process went on: it is at this step, in this phase."""
        self._alive = now = self._clock()
        self.recent.append(Beat(step, phase, now, now))
        self._map[:] = RECORD.pack(step, PHASES.index(phase), now, now)

    def alive(self) -> None:
        """The process runs, and is where it was; any thread may say so."""
        # This field alone: a beat of another thread meanwhile must not be undone.
        self._alive = self._clock()
        ALIVE.pack_into(self._map, RECORD.size - ALIVE.size, self._alive)

    def close(self) -> None:
        """Leaves the last beat in the file."""
        self._map.close()


def read_beat(path: Path) -> Beat | None:
    """The last beat in a file; None where no process has written one."""
    try:
        step, phase, since, alive = RECORD.unpack(path.read_bytes())
    except (FileNotFoundError, struct.error):
        return None
    return Beat(step, PHASES[phase], since, alive) if alive else None
