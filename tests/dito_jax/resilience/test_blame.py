"""Which process caused a failure, from recorded evidence."""

import pytest

from dito_jax.resilience.attempt import End
from dito_jax.resilience.blame import Evidence, verdict


ABRT, KILL, SEGV, HUNG = -6, -9, -11, 86


def ended(process, code, step=9, phase="step", **more):
    return Evidence(End(process, code, killed=False, **more), step, phase, alive=True)


def killed(process, alive, step=9, phase="step", **more):
    """By the supervisor, when another process had failed."""
    return Evidence(End(process, KILL, killed=True, **more), step, phase, alive)


CASES = {
    "one that is killed is the cause, even if its end is seen last": ([ended(0, 1), ended(1, ABRT), ended(2, KILL)], 2),
    "one that crashes while others wait for it": ([ended(1, SEGV), killed(0, True)], 1),
    "a frozen one, when JAX has ended the healthy one": ([ended(1, ABRT), killed(0, False, state="T")], 0),
    "a frozen one, at the same step as all others": ([ended(1, ABRT), ended(2, ABRT), killed(0, False)], 0),
    "a frozen one, when a collective of the other has failed": ([ended(1, 1), killed(0, False)], 0),
    "a frozen one, when the watchdogs of the others have ended them": ([ended(0, HUNG), killed(1, False)], 1),
    "one that JAX has not ended, of which nothing is known": ([ended(1, ABRT), killed(0, None)], 0),
    "two of which nothing is known": ([ended(1, ABRT), killed(0, None), killed(2, None)], None),
    "two that are frozen": ([ended(1, ABRT), killed(0, False), killed(2, False)], None),
    "one that works and was behind, when JAX has ended the other": ([ended(1, ABRT), killed(0, True, step=8)], 0),
    "all at one step, and the other one works": ([ended(1, ABRT), killed(0, True)], None),
    "the one furthest behind of those that hang": ([ended(0, HUNG, 52), ended(1, HUNG, 50), ended(2, HUNG, 51)], 1),
    "the one in the earlier phase of those that hang": ([ended(0, HUNG), ended(1, HUNG, phase="data")], 1),
    "all hang at one step": ([ended(0, HUNG), ended(1, HUNG)], None),
    "one that compiles if the other is ahead": ([ended(0, 1, 20), killed(1, True, 20, phase="compile")], None),
    "one that restores if the other is ahead": ([ended(0, 1, 7, "compile"), killed(1, True, 0, "restore")], None),
    "one far behind that works": ([ended(0, 1, 20), killed(1, True, 12)], None),
    "an exception, as far as the others": ([ended(1, 1, 20), killed(0, True, 19)], 1),
    "an exception before the first heartbeat": ([ended(1, 1, 0, "init"), killed(0, None, 0, "init")], 1),
    "the host of one does not answer": ([ended(1, ABRT, lost=False), killed(0, False)], 0),
    "the connection to one is lost": ([ended(0, 1), ended(1, 255, lost=True)], 1),
    "a single process, whatever its end": ([ended(0, HUNG)], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is(name):
    found, cause = CASES[name]
    given = verdict(found)
    assert given.process == cause
    assert cause is None or found[0].end.process == cause or given.because or not found[0].end.killed


def test_what_is_found_is_said():
    assert verdict([ended(1, ABRT), killed(0, False, state="T")]).because == (
        "process 0 gave no sign of life, at step 9 (step) and stopped (SIGSTOP)"
    )
    assert verdict([ended(0, 1, 20), killed(1, True, 12)]).because == (
        "process 1 was behind, at step 12 (step), but it works"
    )
