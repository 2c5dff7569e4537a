"""Bad steps: log entries, rollback, and the end of the run after too many rollbacks."""

import json

import jax
import jax.numpy as jnp
import pytest

from dito_jax.checkpointing.checkpoint import Checkpoints
from dito_jax.errors import UserError
from dito_jax.resilience.data_position import DataPosition
from dito_jax.resilience.guard import LAG, Guard, skips
from dito_jax.telemetry.events import Events, read_events
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.health import FINE, GRADIENT_SPIKE, NOT_FINITE, GuardConfig


CONFIG = GuardConfig(burst=3, burst_window=10, rollbacks=2)


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


LIKE = {"x": jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}


def unheard(step, error):
    raise AssertionError(error)


def measured(bad=FINE, loss=1.0, norm=2.0):
    return {"loss": jnp.float32(loss), "gradient_norm": jnp.float32(norm), "bad": jnp.int32(bad)}


def guard_of(run):
    return Guard(CONFIG, run, Events(run))


def saved(run, *steps):
    checkpoints = Checkpoints(run.checkpoints)
    for step in steps:
        checkpoints.save(step, {"x": jnp.float32(step)}, metadata={})
    checkpoints.wait()
    return checkpoints


def test_each_bad_step_is_logged_once_later_steps_are_queued(run, capsys):
    guard = guard_of(run)
    guard.watch(7, measured(NOT_FINITE, loss=float("nan")))
    for number in range(8, 7 + LAG):
        guard.watch(number, measured())
        assert not read_events(run)
    guard.watch(7 + LAG, measured(GRADIENT_SPIKE, norm=1234.5))
    assert [row["step"] for row in read_events(run, "bad_step")] == [7]
    guard.settle()
    assert capsys.readouterr().err.splitlines() == [
        "step 7 skipped: loss or gradient not finite.",
        f"step {7 + LAG} skipped: gradient norm spike (1234).",
    ]


def test_a_burst_is_many_bad_steps_in_a_short_time(run):
    guard = guard_of(run)
    for number in range(1, 60):
        guard.watch(number, measured(NOT_FINITE if number % 5 == 0 else FINE))
        assert not guard.burst()
    for number in range(60, 64):
        guard.watch(number, measured(NOT_FINITE))
    guard.settle()
    assert guard.burst()


def test_repeated_bad_steps_roll_back_and_skip_their_data(run):
    guard, checkpoints = guard_of(run), saved(run, 10, 18, 20)
    for number in (18, 21, 22, 23):
        guard.watch(number, measured(NOT_FINITE if number != 22 else FINE))
    target, state = guard.roll_back(24, checkpoints, LIKE, unheard, DataPosition(run, 10))
    assert (target, float(state["x"]), checkpoints.steps()) == (10, 10.0, [10])
    assert all((run.checkpoints / f"{step}.abandoned").is_dir() for step in (18, 20))
    position = DataPosition(run, 10)
    assert [position.after(step) for step in (9, 10, 11, 30)] == [90, 100, 250, 440]
    (row,) = read_events(run, "rollback")
    assert "3 of the steps 18 to 24 were bad" in row["said"]
    assert "rolled back to step 10, skipping the 140 examples since (rollback 1 of 2 to this step)" in row["said"]
    assert skips(run)[0]["because"] == row["said"] and not guard.burst()


def test_after_so_many_rollbacks_to_one_step_the_run_ends(run):
    checkpoints = saved(run, 10)
    for number in (15, 16):
        guard = guard_of(run)  # as after a restart
        for bad in range(12, 15):
            guard.watch(bad, measured(NOT_FINITE))
        guard.roll_back(number, checkpoints, LIKE, unheard, DataPosition(run, 10))
    assert DataPosition(run, 10).after(11) == 100 + 50 + 60 + 10
    guard = guard_of(run)
    for bad in range(12, 15):
        guard.watch(bad, measured(NOT_FINITE))
    with pytest.raises(UserError, match="after 2 rollbacks to step 10: .*step 10 is intact"):
        guard.roll_back(14, checkpoints, LIKE, unheard, DataPosition(run, 10))
    assert checkpoints.steps() == [10] and len(skips(run)) == 2


def test_before_the_first_checkpoint_there_is_no_way_back(run):
    guard, checkpoints = guard_of(run), saved(run, 10)
    for number in (9, 11, 12):
        guard.watch(number, measured(NOT_FINITE))
    with pytest.raises(UserError, match="3 of the steps 9 to 12 were bad .*before the first checkpoint"):
        guard.roll_back(12, checkpoints, LIKE, unheard, DataPosition(run, 10))
    assert not run.skips.exists() and checkpoints.steps() == [10]


def test_the_skip_is_on_the_disk_before_anything_is_set_aside(run):
    guard, checkpoints = guard_of(run), saved(run, 10, 20)
    for number in (18, 21, 23):
        guard.watch(number, measured(NOT_FINITE))

    def killed(*_):
        raise KeyboardInterrupt

    checkpoints.set_aside = killed
    with pytest.raises(KeyboardInterrupt):
        guard.roll_back(24, checkpoints, LIKE, unheard, DataPosition(run, 10))
    assert json.loads(run.skips.read_text())[0] | {"because": ""} == {"after": 10, "examples": 140, "because": ""}


@pytest.mark.parametrize(("again", "event"), [(FINE, "transient"), (NOT_FINITE, "reproduced")])
def test_a_rerun_tells_transient_from_reproducible_bad_steps(run, again, event):
    guard = guard_of(run)
    guard.compare(5, measured(NOT_FINITE), measured(again))
    (row,) = read_events(run)
    assert row["event"] == event and "step 5" in row["said"]
