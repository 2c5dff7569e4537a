"""Rollbacks: killed anywhere, a run goes the same way; a torn skips.json is rebuilt; data lie where they were."""

import json

import jax
import jax.numpy as jnp
import pytest

from dito_jax.checkpointing.checkpoint import Checkpoints
from dito_jax.checkpointing.retention import CheckpointConfig
from dito_jax.errors import UserError
from dito_jax.resilience.data_position import DataPosition
from dito_jax.resilience.skips import finish_rollback, roll_back_to, skips
from dito_jax.telemetry.events import Events, read_events
from dito_jax.telemetry.run_directory import RunDirectory


LIKE = {"x": jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
BECAUSE = "3 of the steps 26 to 29 were bad: rolled back to step 21."


class Killed(BaseException):
    """Ends a rollback at once, as SIGKILL does."""


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints every seven steps, and one start in its log."""
    run = RunDirectory(tmp_path)
    Events(run).record("start", step=0)
    for step in (14, 21, 28):
        save(run, step)
    return run


def save(run, step):
    checkpoints = Checkpoints(run.checkpoints, CheckpointConfig(keep=9))
    checkpoints.save(step, {"x": jnp.float32(step)}, metadata={})
    checkpoints.close()


def at(run, step, batch_size=10, **metadata) -> DataPosition:
    """The position of a run that is restored from a checkpoint with such metadata."""
    position = DataPosition(run, batch_size)
    position.restore(step, metadata)
    return position


def go_back(run, number=29, target=21, examples=80, because=BECAUSE):
    roll_back_to(
        run, Checkpoints(run.checkpoints), Events(run), number=number, target=target, examples=examples, because=because
    )  # fmt: skip


def start_again(run) -> tuple[int, int]:
    """What train.py does at its start: (the step that it begins at, its next example)."""
    checkpoints = Checkpoints(run.checkpoints)
    finish_rollback(run, checkpoints, Events(run))
    restored = checkpoints.restore_newest(LIKE, lambda *_: None)
    assert restored is not None
    return restored[0], at(run, restored[0]).first()


def killed_at(monkeypatch, number: int) -> None:
    """The process ends before the write of this number: events, skips.json and renamed checkpoints, in order."""
    writes = [0]

    def counted(call):
        def called(*arguments, **options):
            writes[0] += 1
            if writes[0] == number:
                raise Killed
            return call(*arguments, **options)

        return called

    for owner, name in ((RunDirectory, "append"), (RunDirectory, "write_text"), (Checkpoints, "set_aside")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("number", range(1, 7))
def test_a_run_killed_anywhere_in_a_rollback_goes_one_of_two_ways(run, monkeypatch, number):
    """As if it had never begun, before the first write; after it, as if it had not been killed."""
    save(run, 24)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, number)
        go_back(run)
        assert number == 6, "there are five writes"
        raise Killed
    assert start_again(run) == ((28, 280) if number == 1 else (21, 290))
    if number > 1:
        assert Checkpoints(run.checkpoints).steps() == [14, 21]
        assert skips(run) == [{"after": 21, "examples": 80, "because": BECAUSE}]
        assert [row["said"] for row in read_events(run, "rollback")] == [BECAUSE]
        save(run, 28)  # the run goes on, and its new step 28 is not taken for the abandoned one
        assert start_again(run) == (28, 360)


@pytest.mark.parametrize("content", ["", "[{", '[{"after": 21, "bat', "{}", '[{"after": 21}]', "null", None])
def test_a_torn_file_is_rebuilt_from_the_events(run, content, capsys):
    go_back(run)
    before = skips(run)
    run.skips.unlink() if content is None else run.skips.write_text(content)
    assert skips(run) == before and at(run, 28).after(30) == 380
    assert start_again(run) == (21, 290) and json.loads(run.skips.read_text()) == before
    assert "skips.json: missing or torn: rebuilt from events.jsonl (1 rollbacks)" in capsys.readouterr().err
    assert start_again(run) == (21, 290) and capsys.readouterr().err == ""


def test_a_torn_file_of_a_run_that_was_never_rolled_back(run):
    run.skips.write_text("[{")
    assert start_again(run) == (28, 280) and json.loads(run.skips.read_text()) == []


def test_without_the_events_a_torn_file_is_one_line(run):
    go_back(run)
    run.skips.write_text("[{")
    run.events.unlink()
    with pytest.raises(
        UserError, match=r"skips\.json: cannot be parsed, and events\.jsonl.*restore one of them"
    ) as error:
        start_again(run)
    assert "\n" not in str(error.value) and Checkpoints(run.checkpoints).steps() == [14, 21]


def test_lost_events_set_nothing_aside(run):
    go_back(run)
    save(run, 28)
    run.events.unlink()
    assert start_again(run) == (28, 360)


def test_a_step_before_a_rollback_has_the_batches_that_it_had(run):
    """The checkpoint of step 21 is lost after the rollback to it: steps 15 to 21 are the same, and then 22 is."""
    go_back(run)
    assert list(at(run, 14).stretches()) == [(140, 7), (290, None)]
    assert list(at(run, 21).stretches()) == [(290, None)] and list(at(run, 25).stretches()) == [(330, None)]


def test_a_rollback_to_an_earlier_step_goes_past_all_examples_since(run):
    go_back(run)  # the next example is 290
    examples = at(run, 21).beyond(26, 14, {})
    go_back(run, number=26, target=14, examples=examples, because="again")
    assert skips(run) == [{"after": 14, "examples": 200, "because": "again"}]
    assert list(at(run, 14).stretches()) == [(340, None)], "examples 290 to 339 were those of the steps 22 to 26"
    before = skips(run)
    run.skips.write_text("")
    assert skips(run) == before


def test_another_batch_size_goes_on_with_the_next_example(run):
    """Also from a checkpoint of version 0.2.0, which has no position: its steps had the batch size of its config."""
    assert at(run, 28, batch_size=30, examples=280).after(30) == 280 + 2 * 30
    assert list(at(run, 28, batch_size=30, examples=280).stretches()) == [(280, None)]
    go_back(run)
    assert list(at(run, 21, batch_size=30, examples=210).stretches()) == [(290, None)]
    of_batch_size_10 = json.dumps({"train": {"batch_size": 10}})
    assert list(at(run, 28, batch_size=30, config=of_batch_size_10).stretches()) == [(280 + 80, None)]
    changed = at(run, 28, batch_size=30, examples=360)
    assert changed.beyond(30, 21, {"examples": 210}) == 70 + 2 * 30


def test_a_skip_that_counts_batches_is_read(run):
    """As version 0.2.0 wrote it; also an event of such a rollback that is not finished."""
    run.write_json("skips.json", [{"after": 14, "batches": 3, "because": "a test"}])
    assert at(run, 14).first() == 170 and at(run, 28).first() == 310
    Events(run).record("rollback_begun", step=29, to=21, batches=8, because=BECAUSE)
    assert start_again(run) == (21, 320)
    assert skips(run)[-1] == {"after": 21, "batches": 8, "because": BECAUSE}
