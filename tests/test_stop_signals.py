"""SIGTERM at fifty random moments of runs: no checkpoint is lost, and the runs end with the undisturbed bits."""

import contextlib
import random
import signal
import time
from pathlib import Path

import pytest

from .test_survival import SHORT, SLOW, SPIKES, Program, beat, digest, dito, environment, events, saved, train


__all__ = ["digest", "dito", "environment", "train"]  # fixtures

MOMENTS = 50
WHEN = ("init", "restore", "compile", "data", "step", "save", "eval", "rollback", "at any time")
ROLLBACK = ("--faults.inject", "spike@22", "spike@23", "spike@24", SLOW, *SPIKES)
STOPPED = {75, 128 + signal.SIGTERM, -signal.SIGTERM}  # the last two: before Python handles signals


def stop(program: Program, run: Path, when: str, chance: random.Random) -> int:
    """Sends SIGTERM at that moment of the program, or at another if it does not come; returns the exit code."""
    began, rollbacks = time.time(), len(events(run, "rollback"))

    def now() -> bool:
        at = beat(run)
        in_phase = at is not None and at.since > began and at.phase == when
        return in_phase or when == "rollback" and len(events(run, "rollback")) > rollbacks

    until = time.monotonic() + (chance.uniform(0.2, 20) if when == "at any time" else 60)
    while program.process.poll() is None and time.monotonic() < until and not now():
        time.sleep(0.001)
    time.sleep(chance.choice((0, 0.003, 0.03)))
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        program.process.send_signal(signal.SIGTERM)
    said, _ = program.process.communicate(timeout=200)
    assert program.process.returncode in STOPPED | {0}, (when, program.process.returncode, said)
    assert "Traceback" not in said, (when, said)
    return program.process.returncode


@pytest.mark.exhaustive("starts train.py some eighty times")
def test_stopped_at_fifty_random_moments_no_checkpoint_is_lost(train, digest, tmp_path):
    seed = time.time_ns()
    chance, stops, told = random.Random(seed), 0, [seed]
    wanted = {}
    for options in (("--faults.inject", SLOW), ROLLBACK):
        train(tmp_path / "whole", *SHORT, *options).ends(0)
        wanted[options] = digest(tmp_path / "whole")
        (tmp_path / "whole").rename(tmp_path / f"whole{len(wanted)}")
    for number in range(MOMENTS):
        options = list(wanted)[number % 2]
        run, finished = tmp_path / f"run{number}", False
        while stops < MOMENTS and not finished:
            before, when = max(saved(run), default=0), chance.choice(WHEN)
            code = stop(train(run, *SHORT, *options), run, when, chance)
            at = beat(run)
            told.append((when, at and (at.phase, at.step), code, saved(run)))
            assert not list(run.glob("checkpoints/*corrupt*")), told
            assert max(saved(run), default=0) >= before or events(run, "rollback"), told
            finished, stops = code == 0, stops + (code != 0)
        train(run, *SHORT, *options).ends(0)
        assert digest(run) == wanted[options], told
        if stops == MOMENTS:
            break
    print(*told, sep="\n")
    assert stops == MOMENTS
