"""Configs and command lines: every mistake is one clear line."""

import dataclasses
import math
import re
from pathlib import Path

import pytest

from dito_jax.config import RENAMED, check, from_json, load, resolved, to_json
from dito_jax.data import DigitsData, ImageFolderData, LatentsData, StrokesData
from dito_jax.errors import UserError
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.overrides import leaves, override
from dito_jax.run.recipe import check_data


ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture
def digits():
    return load(str(ROOT / "configs/digits.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_can_be_built_and_survives_its_json(path):
    config = load(str(path))
    axes = dataclasses.asdict(config.mesh).values()
    check(config, num_devices=math.prod(size for size in axes if size != -1))
    assert from_json(to_json(config)) == config
    assert config.model.num_parameters() > 0


def test_fields_of_earlier_versions_are_read_by_their_new_names(digits):
    changes = {
        "init_from": "runs/a", "train.gradient_accumulation_steps": "2", "loss.loss_type": "x",
        "loss.timestep_sampling": "uniform", "loss.class_dropout_prob": "0.2", "sample.sampler": "euler",
        "privacy.noise_multiplicity": "3", "watchdog.phase_timeout_seconds": "7", "guard.check_replicas_every": "9",
    }  # fmt: skip
    config = override(digits, [word for name, value in changes.items() for word in (f"--{name}", value)])
    text, old = to_json(config), [(old, new) for names in RENAMED.values() for old, new in names.items()]
    for before, now in old:
        assert text.count(f'"{now}":') == 1
        text = text.replace(f'"{now}":', f'"{before}":')
    assert len(old) == len(changes) and from_json(text) == config


def test_an_option_of_an_earlier_version_is_answered_with_its_new_name(digits):
    with pytest.raises(UserError, match="did you mean --train.gradient_accumulation_steps"):
        override(digits, ["--train.accumulation", "2"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_says_its_command(path):
    assert f"python train.py configs/{path.name}" in path.read_text().split('"""')[1]


def test_overrides_take_the_types_of_their_fields(digits):
    changed = override(
        digits,
        ["--train.steps", "7", "--optimizer.learning-rate=3e-4", "--train.ema_decays", "0.9", "0.99", "--model.remat",
         "True", "--sample.guidance_interval", "0.2", "0.8", "--model.num_kv_heads", "2", "--loss.prediction", "v"],
    )  # fmt: skip
    assert (changed.train.steps, changed.optimizer.learning_rate, changed.train.ema_decays) == (
        7,
        3e-4,
        (0.9, 0.99),
    )
    assert changed.model.remat is True and changed.model.num_kv_heads == 2
    assert changed.sample.guidance_interval == (0.2, 0.8) and changed.loss.prediction == "v"
    assert dataclasses.replace(changed, train=digits.train).optimizer != digits.optimizer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.stepz", "5"], r"no option --train.stepz; did you mean --train.steps \(steps\)\?"),
        (["--steps", "5"], r"did you mean --train.steps"),
        (["--optimiser.learning_rate", "5"], r"did you mean --optimizer.learning_rate"),
        (["--train.steps", "many"], r"--train.steps: got 'many'; wanted int"),
        (["--train.steps"], r"--train.steps: got 'nothing'; wanted int"),
        (["--loss.prediction", "y"], r"--loss.prediction: got 'y'; wanted .*'x', 'v', 'eps'"),
        (
            ["--sample.guidance_interval", "0.5"],
            r"--sample.guidance_interval: got '0.5'; wanted tuple\[float, float\]",
        ),
        (["--model.remat", "perhaps"], r"wanted bool"),
        (["stray"], r"unexpected 'stray'"),
        (["--data.path", "/x"], r"no option --data.path"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_the_right_one(digits, arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        override(digits, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "devices", "words"),
    [
        (["--train.batch_size", "30"], 8, r"train.batch_size 30 is not a multiple of .* = 8"),
        (["--train.gradient_accumulation_steps", "3"], 1, r"train.batch_size 128 is not a multiple .* = 3"),
        (
            ["--mesh.data", "1", "--mesh.tensor", "8"],
            8,
            r"model.num_kv_heads 4 is not a multiple of mesh.tensor 8",
        ),
        (["--mesh.data", "2", "--mesh.fsdp", "5"], 10, r"model.width 64 is not a multiple of mesh.fsdp 5"),
        (["--model.patch", "3"], 1, r"model: patch 3 does not divide"),
        (["--sample.ema_decay", "0.5"], 1, r"sample.ema_decay 0.5 is not in train.ema_decays"),
        (["--loss.class_dropout_prob", "0"], 1, r"guidance_scale 1.5 needs loss.class_dropout_prob > 0"),
        (["--train.steps", "0"], 1, r"train.steps is 0; it must be at least 1"),
        (["--guard.burst", "9", "--guard.burst_window", "8"], 1, r"guard.burst 9 cannot come among .* 8 steps"),
        (["--checkpoint.keep_every", "0"], 1, r"checkpoint.keep_every is 0; wanted a number of steps, or None"),
    ],
)
def test_an_impossible_combination_is_one_line_before_any_compile(digits, arguments, devices, words):
    with pytest.raises(UserError, match=words) as caught:
        check(override(digits, arguments), devices)
    assert "\n" not in str(caught.value)


def test_every_leaf_of_every_config_is_an_option_of_a_plain_type(digits):
    names = leaves(digits)
    assert {"train.steps", "checkpoint.every", "model.width", "mesh.fsdp"} <= set(names)
    assert all(re.fullmatch(r"[a-z0-9_.]+", name) for name in names)


def test_data_that_do_not_fit_the_model_are_refused(digits):
    source = digits.data.open("train")
    check_data(digits, source)
    for change, words in [
        ({"image_shape": (16, 16, 1)}, "image_shape is"),
        ({"num_classes": 9}, "num_classes is 9"),
    ]:
        wrong = dataclasses.replace(digits, model=dataclasses.replace(digits.model, **change))
        with pytest.raises(UserError, match=words):
            check_data(wrong, source)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def config(): return 3", "wanted a dito_jax.config.TrainConfig"),
        ("def config(): return undefined", "NameError"),
        ("x = (", "SyntaxError"),
        ("", "has no attribute 'config'"),
    ],
)
def test_a_broken_config_file_is_one_line(text, words, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_config_file_names_the_nearest(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="Did you mean configs/digits.py"):
        load("configs/digit.py")


def test_a_config_of_another_version_is_refused():
    text = to_json(load(str(ROOT / "configs/digits.py")))
    for broken in (text.replace('"steps"', '"stepz"'), text.replace("DigitsData", "Unknown"), text[:-20]):
        with pytest.raises(UserError, match="not of this version"):
            from_json(broken)


def test_data_kinds_survive_json(digits):
    other = dataclasses.replace(digits, data=LatentsData(path="somewhere"))
    assert from_json(to_json(other)).data == LatentsData(path="somewhere")
    assert from_json(to_json(digits)).data == DigitsData()


def test_the_kind_of_data_and_model_is_chosen_on_the_command_line(digits):
    changed = override(digits, ["--data.path", "x", "--data", "image-folder", "--data.image-size", "16"])
    assert changed.data == ImageFolderData(path="x", image_size=16) and changed.infer_from_data
    assert override(digits, ["--data", "strokes", "--data.num", "50"]).data == StrokesData(num=50)
    experts = override(digits, ["--model", "moe_dit", "--model.num_experts", "4"])
    assert isinstance(experts.model, MoEDiTConfig) and experts.model.num_experts == 4
    assert experts.model.width == digits.model.width and not experts.infer_from_data
    assert override(experts, ["--model=dit"]) == digits
    assert type(override(experts, ["--model=dit"]).model) is DiTConfig
    assert not override(digits, ["--data", "strokes", "--model.num_classes", "10"]).infer_from_data


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "image-foldr"], r"--data: got 'image-foldr'; did you mean image-folder\?"),
        (["--data"], r"--data: got 'nothing'; choose from digits, strokes, image-folder, webdataset, parquet, latents"),
        (["--data", "image-folder", "--data.path", "x"], r"give --data.image_size too \(int\)"),
        (
            ["--data.path", "x"],
            r"has --data digits; --data image-folder or .* or --data parquet or --data latents has this option",
        ),
        (["--model.num_experts", "3"], r"has --model dit; --model moe-dit has this option"),
        (["--infer_from_data", "True", "--model.num_classes", "3"], r"add --infer_from_data False"),
    ],
)
def test_a_wrong_kind_is_one_line(digits, arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        override(digits, arguments)
    assert "\n" not in str(caught.value)


def test_shape_and_classes_are_taken_from_the_data_and_stored(digits):
    config = override(digits, ["--data", "strokes", "--data.size", "12"])
    found = resolved(config)
    assert found.model == dataclasses.replace(digits.model, image_shape=(12, 12, 1), num_classes=10)
    assert not found.infer_from_data and resolved(found) is found
    assert from_json(to_json(found)) == found
