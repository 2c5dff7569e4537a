"""The private Program: the noise of its step is that of the plan, for every way to make it."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from scipy.stats import binom

from dito_jax.config import TrainConfig
from dito_jax.data import StrokesData
from dito_jax.diffusion.loss import LossConfig
from dito_jax.models.dit import DiTConfig
from dito_jax.privacy import program as private_program
from dito_jax.privacy.keys import StepKeys
from dito_jax.privacy.ledger import Ledger, ledger_path
from dito_jax.privacy.program import make_private_program
from dito_jax.privacy.settings import PrivacyConfig, StepPlan
from dito_jax.run.recipe import make_recipe, planned_program
from dito_jax.sharding import MeshConfig, batch_pieces, make_mesh
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.health import GuardConfig
from dito_jax.training.optimizer import OptimizerConfig
from dito_jax.training.program import LoopConfig


pytestmark = pytest.mark.recorded


MODEL = DiTConfig(image_shape=(4, 4, 1), num_classes=10, patch=2, depth=1, width=32, num_heads=4)
LOOP = LoopConfig(steps=4, batch_size=10)
KEYS = StepKeys(bytes(32), "run", 0)


@pytest.fixture(autouse=True)
def plain_descent(monkeypatch):
    """The change of the parameters is minus the published gradient."""
    monkeypatch.setattr(private_program, "make_optimizer", lambda config, steps: optax.sgd(1.0))


@pytest.fixture
def mesh():
    made = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    with jax.set_mesh(made):
        yield made


def published(program, batch):
    """All numbers of the gradient that one step publishes."""
    state = program.init()
    before = jax.tree.map(np.asarray, state.params)
    after, _ = program.step(state, program.place(batch))
    change = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64).ravel(), before, after.params)
    return np.concatenate(jax.tree.leaves(change))


def empty(program):
    """A batch that drew nobody: what is published of it is noise alone."""
    batch = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in program.batch.items()}
    keys = {f"{purpose}_key": KEYS.key(1, purpose) for purpose in ("draw", "noise")}
    return batch | keys | {"padding": np.ones_like(batch["padding"])}


def check_noise(values, stddev):
    """Within 5 standard errors, each 1/sqrt(2 n) of the standard deviation of n numbers: 2 % in all."""
    assert values.size > 30_000
    assert values.std() == pytest.approx(stddev, rel=5 / np.sqrt(2 * values.size))


@pytest.mark.parametrize(
    ("loop", "privacy"),
    [
        ({}, {}),
        (
            dict(
                gradient_accumulation_steps=2, ema_decays=(0.5, 0.9), compute_dtype="float32", steps=900, batch_size=64
            ),
            dict(
                noise_multiplicity=3, images_per_user=2, backend="microbatch", internal=True, epsilon=1.0, spare_steps=7
            ),
        ),
    ],
    ids=["plain", "all else changed"],
)
def test_the_noise_is_the_plans_sigma_times_the_clip_norm_over_the_expected_batch(mesh, loop, privacy):
    """Nothing else of the settings has a part in it."""
    plan = StepPlan(noise_multiplier=3.0, sampling_prob=0.25, num_units=20, max_batch=8)
    program = make_private_program(
        MODEL, LossConfig(), OptimizerConfig(), dataclasses.replace(LOOP, **loop), mesh, GuardConfig(),
        dataclasses.replace(PrivacyConfig(epsilon=8.0, clip_norm=0.7), **privacy), plan,
    )  # fmt: skip
    check_noise(published(program, empty(program)), 3.0 * 0.7 / 5)


def test_a_runs_noise_is_that_which_its_ledger_was_charged_for(mesh, tmp_path, monkeypatch):
    monkeypatch.setenv("DITO_LEDGERS", str(tmp_path / "ledgers"))
    monkeypatch.setenv("DITO_SECRETS", str(tmp_path / "secrets"))
    privacy = PrivacyConfig(epsilon=1.0, delta=1e-2, dataset="few", max_batch=20, clip_norm=0.7)
    config = TrainConfig(MODEL, StrokesData(num=20, size=4), LOOP, privacy=privacy)
    recipe = make_recipe(config, RunDirectory(tmp_path), mesh)
    batch = next(recipe.batches_after(0))
    (charged,) = Ledger(ledger_path("few")).spent()
    assert charged.sampling_prob * 20 == LOOP.batch_size
    # Drawn anew by every run: 5 standard errors are passed by one in two million.
    values = published(recipe.program, batch | {"padding": np.ones_like(batch["padding"])})
    check_noise(values, charged.noise_multiplier * 0.7 / LOOP.batch_size)


def test_costs_are_those_of_a_batch_with_the_padding_of_a_run(mesh):
    """So many rows that a step draws more with probability below delta / (100 steps): 1.5 times the expected 256."""
    loop = dataclasses.replace(LOOP, batch_size=256, steps=400_000)
    privacy = PrivacyConfig(epsilon=8.0, delta=1e-7, dataset="few")
    config = TrainConfig(MODEL, StrokesData(num=20, size=4), loop, privacy=privacy)
    rows = planned_program(config, mesh, 1_281_167).batch["image"].shape[0]
    risk = lambda rows: binom.sf(rows - 1, 1_281_166, 256 / 1_281_167) * 400_000
    multiple = batch_pieces(mesh.shape)
    assert risk(rows) < 1e-9 <= risk(rows - multiple) and rows > 1.5 * 256
    assert planned_program(config, mesh).batch["image"].shape[0] == pytest.approx(rows, abs=multiple)
