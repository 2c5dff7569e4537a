"""What a run is told before it trains."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from dito_jax.config import load, resolved
from dito_jax.data import class_names
from dito_jax.errors import UserError
from dito_jax.overrides import override
from dito_jax.privacy.budget import Budget
from dito_jax.privacy.ledger import Ledger, ledger_path
from dito_jax.privacy.settings import PrivacyConfig
from dito_jax.resilience.data_position import DataPosition
from dito_jax.run import recipe
from dito_jax.run.monitor import make_monitor
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.telemetry.progress import ProgressMeter
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


def test_without_an_evaluation_no_validation_split_is_needed(folder, tmp_path, capsys):
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    with jax.set_mesh(mesh):
        made = recipe.make_recipe(
            config_of(folder, "--evaluation.num_samples", "0"), RunDirectory(tmp_path / "run"), mesh
        )
    assert "no validation loss: " in capsys.readouterr().err
    assert made.validation is None and class_names(made.source) == ["ant", "owl"]


def test_the_shape_and_the_classes_are_those_of_the_folder(folder):
    model = config_of(folder).model
    assert model.image_shape == (8, 8, 3) and model.num_classes == 2


def test_a_private_run_of_users_is_charged_by_user(folder, tmp_path, monkeypatch, capsys):
    """The owner of an image is the first letter of its folder, and both classes have images of both owners.

    There is no validation loss, which would be that of the users' own images.
    """
    monkeypatch.setenv("DITO_LEDGERS", str(tmp_path / "ledgers"))
    monkeypatch.setenv("DITO_SECRETS", str(tmp_path / "secrets"))
    monkeypatch.setattr(recipe, "check_gradients", lambda *_: None)  # which compiles, and has its own tests
    for name in ("owl", "ant"):
        for owner, number in (("x", 0), ("y", 1), ("y", 2)):
            (folder / "train" / name / owner).mkdir(exist_ok=True)
            (folder / "train" / name / f"{number}.png").rename(folder / "train" / name / owner / f"{number}.png")
    users = ["--data.nested", "True", "--data.owner_pattern", "/(.+)/", "--privacy.images_per_user", "3"]
    private = ["--privacy.epsilon", "3", "--privacy.delta", "1e-2", "--privacy.dataset", "photos"]
    small = ["--model.depth", "1", "--model.width", "16", "--model.num_heads", "1", "--train.batch_size", "2"]
    config = config_of(folder, *users, *private, *small, "--train.steps", "3", "--evaluation.num_samples", "0")
    mesh = make_mesh(MeshConfig(), np.array(jax.devices()[:1]))
    with jax.set_mesh(mesh):
        made = recipe.make_recipe(config, RunDirectory(tmp_path / "run"), mesh)
    given = dataclasses.replace(made, validation=made.source)
    monitor = lambda config: make_monitor(config, RunDirectory(tmp_path / "run"), given, ProgressMeter, lambda: False)
    assert (
        monitor(config).validation is None and "no validation loss: held-out images belong" in capsys.readouterr().err
    )
    assert monitor(dataclasses.replace(config, privacy=PrivacyConfig())).validation is not None
    batch = next(made.batches_from(DataPosition(RunDirectory(tmp_path / "run"), config.train.batch_size)))
    assert batch["image"].shape == (2, 3, 8, 8, 3), "both users, and three of the images of each"
    assert (~batch["padding"]).sum(axis=1).tolist() in ([2, 3], [3, 2]), "a user of two images, one of four"
    ledger = Ledger(ledger_path("photos"))
    assert ledger.budget == Budget(3.0, 1e-2, "user")
    [(release, steps)] = ledger.spent().items()
    assert release.sampling_prob == 1 and steps == 1
