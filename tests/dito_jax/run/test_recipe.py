"""What a run is told before it trains."""

import jax
import numpy as np
import pytest
from PIL import Image

from dito_jax.config import load, resolved
from dito_jax.data import class_names
from dito_jax.errors import UserError
from dito_jax.overrides import override
from dito_jax.run import recipe
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.telemetry.run_directory import RunDirectory


@pytest.fixture
def folder(tmp_path):
    """Two classes with a split of their own, of which the validation part is missing."""
    for name in ("owl", "ant"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((8, 8, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / "train" / name / f"{number}.png")
    return tmp_path / "photos"


def config_of(folder, *more: str):
    return resolved(override(load("images"), ["--data.path", str(folder), "--data.image_size", "8", *more]))


def test_a_validation_split_that_is_missing_is_reported_before_anything_is_made(folder, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(recipe, "make_program", lambda *_: made.append(1) or pytest.fail("it goes on"))
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    with pytest.raises(UserError, match="validation"):
        recipe.make_recipe(config_of(folder), RunDirectory(tmp_path / "run"), mesh)
    assert not made


def test_without_an_evaluation_no_validation_split_is_needed(folder, tmp_path):
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    with jax.set_mesh(mesh):
        made = recipe.make_recipe(
            config_of(folder, "--evaluation.num_samples", "0"), RunDirectory(tmp_path / "run"), mesh
        )
    assert made.validation is None and class_names(made.source) == ["ant", "owl"]


def test_the_shape_and_the_classes_are_those_of_the_folder(folder):
    model = config_of(folder).model
    assert model.image_shape == (8, 8, 3) and model.num_classes == 2
