"""`dito train CONFIG --help`: every field with its type, its choices, its meaning and its value."""

import re
import sys

import pytest

from dito_jax.bundled import built_in_configs
from dito_jax.config import load
from dito_jax.overrides import leaves
from dito_jax.run.arguments import train_arguments


@pytest.fixture
def shown(capsys, monkeypatch):
    """`shown(*arguments)`: the help on one line, with single spaces and without the frames."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["dito"])

    def show(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            train_arguments([*arguments, "--help"])
        assert not end.value.code
        return re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().out)

    return show


def test_every_field_is_there_with_its_type_and_its_value(shown):
    text = shown("digits")
    for name in leaves(load("digits")):
        assert f" --{name} " in text, name
    assert "--train.steps INT " in text and "(default: 1500)" in text
    assert "--loss.prediction {x,v,eps}" in text and "--run_dir STR" in text and "(default: runs/digits)" in text
    assert "Warm start: the run directory whose EMA parameters this run starts from." in text


def test_the_values_are_those_of_the_whole_command_line(shown):
    text = shown("digits", "--model", "moe-dit", "--data", "image-folder", "--data.path", "a/b", "--data.image-size=48")
    assert "--model.num_experts INT" in text
    assert re.search(r"--data.path STR [^-]*\(default: a/b\)", text) and "(default: 48)" in text
    assert (
        "--model {dit,moe-dit} " in text and "--data {digits,strokes,image-folder,webdataset,parquet,latents}" in text
    )


def test_without_a_config_the_usage_and_the_built_in_configs_are_shown(shown):
    text = shown()
    assert text.startswith("usage: dito train CONFIG [--run-dir DIR]")
    assert all(f" {name} " in text for name in built_in_configs())
