"""The clock of a run: seconds since 1970 that do not jump when the time of day is set."""

import dataclasses
import time
from pathlib import Path

from dito_jax.telemetry.run_directory import RunDirectory, json_lines


BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Goes on while the machine is suspended, and is the same in all processes; macOS has no such clock.
SINCE_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclasses.dataclass(frozen=True)
class RunClock:
    """Returns the seconds since the boot of this machine plus a constant, when called."""

    boot: str  # random id of the boot; empty where the system has none
    offset: float  # seconds since 1970 at the boot, as the time of day was when the run first started in this boot

    def __call__(self) -> float:
        return time.clock_gettime(SINCE_BOOT) + self.offset


def run_clock(run: RunDirectory) -> RunClock:
    """The clock of a run on this machine; all starts of the run since the boot have the same one (goodput.jsonl)."""
    boot = boot_id()
    for row in reversed(json_lines(run.goodput, boot=str, offset=float)):
        if boot and row["boot"] == boot:
            return RunClock(boot, row["offset"])
    return RunClock(boot, time.time() - time.clock_gettime(SINCE_BOOT))


def boot_id() -> str:
    """The random id of this boot of the machine; empty if unknown."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
