"""What a start of a run is compared with: lost checkpoints, its length, another data set, other options."""

import json

import numpy as np
import pytest
from PIL import Image

from dito_jax.checkpointing.identity import Owner, config_change
from dito_jax.data import DigitsData, ImageFolderData, LatentsData
from dito_jax.errors import UserError
from dito_jax.run.resume import check_first_step, compare_data, recorder
from dito_jax.telemetry.events import Events, read_events
from dito_jax.telemetry.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def test_a_run_that_is_longer_than_asked_for_is_refused(run):
    check_first_step(run, 40, 40)
    with pytest.raises(UserError, match=r"train\.steps is 39, and .*run is trained up to step 40: give a larger"):
        check_first_step(run, 40, 39)


def test_a_new_run_and_one_that_was_killed_before_its_first_checkpoint_begin_at_step_0(run):
    check_first_step(run, None, 40)
    Events(run).record("start", step=0)
    (run.checkpoints / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    check_first_step(run, None, 40)


def aside(run):
    (run.checkpoints / "7.corrupt").mkdir(parents=True)
    (run.checkpoints / "14.corrupt").mkdir()


def tells_of_one(run):
    record = recorder(run, Events(run))
    record(7)
    record(14)
    assert [row["step"] for row in read_events(run)] == [7]
    recorder(run, Events(run))(21)
    assert [row["step"] for row in read_events(run)] == [7]


def resumed(run):
    Events(run).record("start", step=7)


def linked(run):
    run.path.mkdir()
    run.checkpoints.symlink_to("/not/mounted")


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (aside, r"14\.corrupt was set aside \(rename it to 14 to try it again\)"),
        (tells_of_one, r"events\.jsonl tells of one"),
        (resumed, r"events\.jsonl tells of one"),
        (linked, "it is a link to /not/mounted, which is not there"),
    ],
)
def test_a_run_that_has_lost_its_checkpoints_does_not_begin_at_step_0(run, lose, why):
    lose(run)
    with pytest.raises(UserError, match=f"no checkpoint is left to resume from, though {why}: bring one back") as error:
        check_first_step(run, None, 40)
    assert "\n" not in str(error.value)
    check_first_step(run, 7, 40)


def images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / name)
    return ImageFolderData(str(folder), image_size=4, channels=1, flip=False).open("train")


def told(run, source, capsys) -> str:
    """What the second start says of its data."""
    compare_data(run, source, Events(run))
    return capsys.readouterr().err


def test_one_image_more_less_or_in_place_of_another_is_told(run, tmp_path, capsys):
    folder = tmp_path / "photos"
    first = [f"train/{name}/{number}.png" for name in ("ant", "owl") for number in range(3)]
    assert told(run, images(folder, *first), capsys) == "", "it is the first start"
    assert told(run, images(folder), capsys) == ""
    folder.rename(folder := tmp_path / "moved")
    assert told(run, images(folder), capsys) == ""
    said = told(run, images(folder, "train/owl/3.png"), capsys)
    assert "6 examples of 2 classes" in said and "7 examples of 2 classes" in said and "repeated or passed over" in said
    (folder / "train/ant/0.png").unlink()
    assert "7 examples of 2 classes" in told(run, images(folder), capsys)
    (folder / "train/ant/1.png").rename(folder / "train/owl/1b.png")
    assert told(run, images(folder), capsys) != "" and told(run, images(folder), capsys) == ""
    assert len(read_events(run, "data_changed")) == 3
    (run.path / "data.json").write_text("[")
    assert told(run, images(folder), capsys) == "", "a torn file is rewritten"
    assert json.loads((run.path / "data.json").read_text())["examples"] == 6


def test_other_labels_of_latents_are_told(run, tmp_path, capsys):
    path = tmp_path / "latents.npz"
    for labels, changed in (([0, 1, 2], False), ([0, 1, 2], False), ([0, 2, 1], True)):
        np.savez(path, latents=np.zeros((30, 2, 2, 4), np.float32), labels=np.array(labels * 10))
        assert bool(told(run, LatentsData(str(path)).open("train"), capsys)) == changed
    assert "1,442 examples of 10 classes" in told(run, DigitsData().open("train"), capsys)


def test_changed_options_are_named_with_both_values(run):
    before = {"train": {"batch_size": 48, "seed": 0}, "loss": {"prediction": "x"}}
    now = json.dumps({"train": {"batch_size": 96, "seed": 0}, "loss": {"prediction": "v"}})
    record = {"identity": Owner(config=json.dumps(before)).identity(7), "metadata": {"config": json.dumps(before)}}
    line = config_change(run.checkpoints / "7", record, Owner(config=now))
    assert line is not None and line.endswith(': train.batch_size 48 -> 96, loss.prediction "x" -> "v".')
    assert config_change(run.checkpoints / "7", record, Owner(config=json.dumps(before))) is None
