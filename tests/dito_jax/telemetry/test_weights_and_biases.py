"""Weights & Biases: what is sent to the package wandb, by a stand-in and, where it is installed, offline by itself."""

import importlib.util
import sys
import types

import numpy as np
import pytest

from dito_jax.errors import UserError
from dito_jax.telemetry.metrics import MetricsWriter, read_metrics
from dito_jax.telemetry.run_directory import RunDirectory


class Run:
    """A stand-in for a wandb run."""

    def __init__(self):
        self.logged, self.finished, self.metrics = [], False, []

    def log(self, values):
        assert not self.finished
        self.logged.append(values)

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; `started` has the arguments of each init."""
    package: object = types.SimpleNamespace(
        Image=lambda pixels: ("image", pixels.shape), Error=RuntimeError, started=[]
    )

    def init(**arguments):
        package.started.append(arguments | {"run": Run()})  # pyright: ignore
        return package.started[-1]["run"]  # pyright: ignore

    package.init = init  # pyright: ignore
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_numbers_and_images_are_sent_with_their_step_and_a_resumed_run_goes_on(tmp_path, wandb):
    run = RunDirectory(tmp_path / "mine")
    run.write_json("run.json", {"id": "abc"})
    for after in (None, 3):
        with MetricsWriter(run, after=after, wandb_project="digits") as metrics:
            metrics.write(3 if after is None else 4, {"loss": 0.5, "cache": "hit", "mfu": None})
            metrics.rewind(4)  # closes the files, and not the run
            metrics.image(4, "samples", np.zeros((8, 16, 3), np.uint8))
    first, second = wandb.started
    assert first["run"].logged == [{"step": 3, "loss": 0.5}, {"step": 4, "samples": ("image", (8, 16, 3))}]
    assert second["run"].logged[0] == {"step": 4, "loss": 0.5}
    assert first["run"].finished and first["run"].metrics == [("*", "step")]
    assert first["project"] == "digits" and first["name"] == "mine" and first["resume"] == "allow"
    assert first["id"] == second["id"] and first["dir"] == str(run.path)


def test_without_a_project_nothing_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    with MetricsWriter(RunDirectory(tmp_path)) as metrics:
        metrics.write(1, {"loss": 0.5})
    with pytest.raises(UserError, match="needs the package wandb: pip install"):
        MetricsWriter(RunDirectory(tmp_path), wandb_project="digits")


def test_a_run_that_cannot_start_is_one_line(tmp_path, wandb):
    def init(**_):
        raise wandb.Error("no API key\nconfigured")

    wandb.init = init
    with pytest.raises(UserError, match="'digits': no API key configured; log in with `wandb login`, or set"):
        MetricsWriter(RunDirectory(tmp_path), wandb_project="digits")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the optional package wandb is not installed")
def test_the_package_itself_takes_them_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunDirectory(tmp_path)
    with MetricsWriter(run, wandb_project="digits") as metrics:
        metrics.write(3, {"loss": 0.5})
        metrics.image(3, "samples", np.zeros((8, 16, 3), np.uint8))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert read_metrics(run) == [{"step": 3, "loss": 0.5}]
