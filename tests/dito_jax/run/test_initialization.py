"""What a new run begins with, and what it must not."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dito_jax.checkpointing.checkpoint import Checkpoints
from dito_jax.config import TrainConfig, to_json
from dito_jax.data import DigitsData, ImageFolderData, LatentsData
from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig
from dito_jax.privacy.run import PLAN
from dito_jax.privacy.settings import PrivacyConfig
from dito_jax.run.initialization import ancestors, initial_state, place
from dito_jax.run.recipe import _private_ancestors
from dito_jax.run.saved_run import opened
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.program import LoopConfig, make_program


def faces(path="faces", **options):
    return ImageFolderData(path, image_size=8, **options)


CONFIG = TrainConfig(
    model=DiTConfig((8, 8, 1), num_classes=10, patch=4, depth=1, width=32, num_heads=4),
    data=LatentsData(path="public.npz"),
    train=LoopConfig(steps=4, batch_size=8, compute_dtype="float32", ema_decays=(0.5, 0.9)),
)
PRIVATE = PrivacyConfig(epsilon=1.0, dataset="digits")


def made(config, mesh):
    return make_program(config.model, config.loss, config.optimizer, config.train, mesh, config.guard)


def a_run(path, config):
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    return str(path)


@pytest.mark.parametrize("num_classes", [10, 7])
def test_a_run_begins_with_the_average_of_another(num_classes, tmp_path, capsys):
    """Private, with adapters; with other classes the class embedding is that of its own initialization."""
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    path = a_run(tmp_path / "old", CONFIG)
    with jax.set_mesh(mesh):
        trained = made(CONFIG, mesh).init()
        ema = {
            "0.5": jax.tree.map(lambda a: a + 1, trained.params),
            "0.9": jax.tree.map(lambda a: a + 2, trained.params),
        }
        checkpoints = Checkpoints(tmp_path / "old/checkpoints", CONFIG.checkpoint)
        checkpoints.save(4, dataclasses.replace(trained, ema=ema, step=trained.step + 4), metadata={})
        checkpoints.close()
        config = dataclasses.replace(
            CONFIG, init_from=path, privacy=PRIVATE, data=DigitsData(),
            model=dataclasses.replace(CONFIG.model, adapter_rank=2, num_classes=num_classes),
            train=dataclasses.replace(CONFIG.train, trainable=("lora_a", "lora_b", "label"), seed=1),
        )  # fmt: skip
        state = initial_state(config, made(config, mesh), mesh)
        fresh = made(config, mesh).init().params
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("init_from")]
    assert len(said) == (num_classes != 10) and all("7 classes instead of 10, so the class" in line for line in said)
    table = trained.params["label"]["table"][...] + 1 if num_classes == 10 else fresh["label"]["table"][...]
    for found in (state.params, state.ema["0.5"], state.ema["0.9"]):
        np.testing.assert_array_equal(found["label"]["table"][...], table)
        np.testing.assert_array_equal(found["patches"]["kernel"][...], trained.params["patches"]["kernel"][...] + 1)
        assert not np.any(found["blocks"]["attention"]["qkv"]["lora_b"][...])
        assert np.any(found["blocks"]["attention"]["qkv"]["lora_a"][...])
    assert int(state.step) == 0


def test_runs_that_start_from_each_other_are_one_line(tmp_path):
    one = a_run(tmp_path / "one", dataclasses.replace(CONFIG, init_from=str(tmp_path / "other")))
    a_run(tmp_path / "other", dataclasses.replace(CONFIG, init_from=one))
    with pytest.raises(UserError, match="one: a run that starts from itself"):
        list(ancestors(one))


def test_a_config_that_describes_no_model_is_one_line(tmp_path):
    path = a_run(tmp_path / "run", dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, depth=-1)))
    with pytest.raises(UserError, match=r"config\.json: .*depth.*: restore it from a copy"):
        opened(path)
    (tmp_path / "run/config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not of this version"):
        opened(path)


@pytest.mark.parametrize("between", [False, True])
def test_a_private_run_does_not_begin_with_what_saw_its_data(tmp_path, between):
    """Nor with what began with that, two runs back."""
    saw = a_run(tmp_path / "saw", dataclasses.replace(CONFIG, data=DigitsData()))
    start = a_run(tmp_path / "between", dataclasses.replace(CONFIG, init_from=saw)) if between else saw
    config = dataclasses.replace(CONFIG, data=DigitsData(), privacy=PRIVATE, init_from=start)
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    with jax.set_mesh(mesh), pytest.raises(UserError, match="saw: that run saw the same data without privacy"):
        initial_state(config, made(config, mesh), mesh)


@pytest.mark.parametrize(
    ("saw", "refused"),
    [
        (faces(flip=False), True),
        (faces("./faces/"), True),
        (faces("faces/train"), True),
        (LatentsData("faces"), True),
        (LatentsData("faces/{split}.npz"), True),
        (LatentsData("faces/train-*.arrayrecord"), True),
        (faces("~/faces"), False),
        (faces("faces2"), False),
        (DigitsData(), False),
    ],
)
def test_data_read_otherwise_are_the_same_data(tmp_path, saw, refused):
    start = a_run(tmp_path / "saw", dataclasses.replace(CONFIG, data=saw))
    config = dataclasses.replace(CONFIG, data=faces(), privacy=PRIVATE, init_from=start)
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    wanted = "that run saw the same data without privacy" if refused else "no checkpoint yet"
    with jax.set_mesh(mesh), pytest.raises(UserError, match=wanted):
        initial_state(config, made(config, mesh), mesh)


def test_a_private_start_on_the_same_data_has_the_same_ledger(tmp_path):
    other = dataclasses.replace(PRIVATE, dataset="other")
    start = a_run(tmp_path / "saw", dataclasses.replace(CONFIG, data=DigitsData(), privacy=other))
    config = dataclasses.replace(CONFIG, data=DigitsData(), privacy=PRIVATE, init_from=start)
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    with (
        jax.set_mesh(mesh),
        pytest.raises(UserError, match="charged to 'other', not to 'digits': one data set has one"),
    ):
        initial_state(config, made(config, mesh), mesh)


def test_the_runs_behind_a_private_one_are_those_on_its_data_set(tmp_path):
    def begun(name, privacy, start=None):
        path = a_run(tmp_path / name, dataclasses.replace(CONFIG, privacy=privacy, init_from=start))
        if privacy.epsilon is not None:
            (tmp_path / name / PLAN).write_text(json.dumps({"run": f"run {name}"}))
        return path

    def trained_further(path):
        (path / "checkpoints/4").mkdir(parents=True)
        (path / PLAN).write_text(json.dumps({"run": "it", "starts_from": []}))
        return RunDirectory(path)

    first = begun("first", PRIVATE)
    public = begun("public", PrivacyConfig(), first)
    last = begun("last", dataclasses.replace(PRIVATE, dataset="other"), begun("again", PRIVATE, public))
    config = dataclasses.replace(CONFIG, privacy=PRIVATE, init_from=last)
    new = RunDirectory(tmp_path / "new")
    assert _private_ancestors(config, new) == ["run again", "run first"]
    assert _private_ancestors(config, trained_further(tmp_path / "new")) == []  # it has kept its own
    (tmp_path / "first" / PLAN).unlink()
    with pytest.raises(UserError, match="first: a private run without its privacy.json; restore that"):
        _private_ancestors(config, RunDirectory(tmp_path / "newer"))
    assert place(LatentsData("~/lat/{split}.npz")) == str(Path.home().resolve() / "lat")


def test_a_run_whose_own_start_is_gone_cannot_be_vouched_for(tmp_path):
    start = a_run(tmp_path / "old", dataclasses.replace(CONFIG, init_from=str(tmp_path / "gone")))
    config = dataclasses.replace(CONFIG, data=DigitsData(), privacy=PRIVATE, init_from=start)
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    with jax.set_mesh(mesh), pytest.raises(UserError, match="gone: no run here"):
        initial_state(config, made(config, mesh), mesh)
