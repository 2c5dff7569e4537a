"""Which process caused the end of an attempt: by evidence of who was lost or behind, not by who ended first.

JAX ends the healthy processes when one of them no longer answers (SIGABRT), the watchdog ends all of them when one
hangs (86), and a collective fails in every process that waits for a lost one. So those ends say nothing about the
process that has them.
"""

import dataclasses
import signal
from collections.abc import Sequence

from dito_jax.errors import HUNG
from dito_jax.resilience.attempt import End


ORDER = ("init", "restore", "compile", "data", "step", "save", "eval", "done")  # phases of a start, at one step
AHEAD = 3  # steps that a process may be ahead of one that works: its devices have so many queued


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known of one process when all have ended."""

    end: End
    step: int
    phase: str  # one of telemetry.heartbeat.PHASES
    alive: bool | None  # a sign of life after the first failure; None: it cannot be told

    @property
    def position(self) -> tuple[int, int]:
        return self.step, ORDER.index(self.phase)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The process that caused the failure, None if that is unknown; and a clause that says what was found."""

    process: int | None
    because: str


def verdict(found: Sequence[Evidence]) -> Verdict:
    """The process that caused the end of an attempt, from the evidence of all processes in the order of their ends."""
    failed = [each for each in found if each.end.code and not each.end.killed]
    if not failed:
        return Verdict(None, "no process was found to be the cause")
    first = failed[0]
    if own := [each for each in failed if each.end.lost or each.end.code < 0 and each.end.code != -signal.SIGABRT]:
        return _ended(own[0])
    killed = [each for each in found if each.end.killed]
    silent = [each for each in killed if each.alive is False]
    if not silent and first.end.code == -signal.SIGABRT and len(killed) == 1 and killed[0].alive is None:
        silent = killed  # JAX has ended all processes but the one that no longer answered
    if silent:
        return _only(silent, "gave no sign of life")
    last = [each for each in found if each.position == min(other.position for other in found)]
    if first.end.code in (-signal.SIGABRT, HUNG):
        return _only(last, "was behind") if len(found) > 1 else _ended(first)
    if _far_behind(last[0], first):  # it may have failed because it waited for the other
        return Verdict(None, f"process {last[0].end.process} was behind, {_where(last[0])}, but it works")
    return _ended(first)


def _ended(one: Evidence) -> Verdict:
    return Verdict(one.end.process, "")


def _only(found: Sequence[Evidence], what: str) -> Verdict:
    """The only process of `found`; if there are several, or equals, none of them is the cause alone."""
    if len(found) == 1:
        return Verdict(found[0].end.process, f"process {found[0].end.process} {what}, {_where(found[0])}")
    return Verdict(None, "no process was found to be the cause")


def _where(one: Evidence) -> str:
    stopped = " and stopped (SIGSTOP)" if one.end.state in ("T", "t") else ""
    return f"at step {one.step} ({one.phase}){stopped}"


def _far_behind(last: Evidence, first: Evidence) -> bool:
    (step, phase), (its_step, its_phase) = last.position, first.position
    compiled = ORDER.index("compile")
    return step < its_step - AHEAD or phase <= compiled < its_phase or phase < its_phase <= compiled
