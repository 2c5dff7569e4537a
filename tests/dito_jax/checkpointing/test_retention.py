"""Checkpoint retention: which saves are kept, and when a save is due."""

import pytest

from dito_jax.checkpointing.retention import CheckpointConfig, SaveClock, check_best_metric, superfluous
from dito_jax.errors import UserError


@pytest.mark.parametrize(
    ("config", "gone"),
    [
        (CheckpointConfig(keep=2), [10, 20, 30, 40]),
        (CheckpointConfig(keep=2, keep_every=20), [10, 30]),
        (CheckpointConfig(keep=1, keep_best=2), [10, 30, 50]),
        (CheckpointConfig(keep=1, keep_best=1, keep_every=30), [10, 20, 50]),
        (CheckpointConfig(keep=9), []),
    ],
    ids=["last", "every", "best", "all three", "few"],
)
def test_the_last_the_best_and_the_periodic_stay(config, gone):
    saved = {10: None, 20: 0.2, 30: float("nan"), 40: 0.1, 50: 0.3, 60: 0.4}
    assert superfluous(saved, config) == gone


def test_a_metric_that_nobody_measures_is_one_line():
    config = CheckpointConfig(keep_best=1, best_metric="lss")
    with pytest.raises(UserError, match="best_metric 'lss' is not measured; choose from loss, bad_steps"):
        check_best_metric(config, {"loss": 1.0, "bad_steps": 0})
    check_best_metric(config, {})
    check_best_metric(CheckpointConfig(best_metric="lss"), {"loss": 1.0})


def test_of_equals_the_later_is_the_better():
    assert superfluous({1: 0.5, 2: 0.5, 3: 0.9}, CheckpointConfig(keep=1, keep_best=1)) == [1]


def test_a_save_is_due_when_its_time_has_come():
    now = 100.0
    clock = SaveClock(CheckpointConfig(every=7, every_seconds=60.0), 5, lambda: now)
    assert [step for step in range(1, 22) if clock.due(step)] == [7, 14, 21]
    now = 160.0
    assert [step for step in range(1, 15) if clock.due(step)] == [5, 7, 10, 14]
    clock.saved()
    assert not clock.due(5)
    now = 1e9
    assert not SaveClock(CheckpointConfig(every=7), 5, lambda: now).due(5)
