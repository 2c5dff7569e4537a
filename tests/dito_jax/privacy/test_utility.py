"""`dito privacy utility`: one row per run or baseline, and errors for runs that are not comparable."""

import argparse
import dataclasses

import pytest

from dito_jax import config as configs
from dito_jax.cli import utility as cli_utility
from dito_jax.data import StrokesData
from dito_jax.errors import UserError
from dito_jax.telemetry.run_directory import RunDirectory


pytestmark = pytest.mark.recorded("configs")


CONFIG = configs.load("configs/dp_digits.py")


def finished(path, utility, **privacy):
    """A private run that began with the strokes beside it."""
    run, start = RunDirectory(path), RunDirectory(path.parent / "strokes")
    public = configs.load("configs/strokes.py")
    start.write_text("config.json", configs.to_json(dataclasses.replace(public, data=StrokesData(num=400))))
    config = dataclasses.replace(
        CONFIG, init_from=str(start.path), privacy=dataclasses.replace(CONFIG.privacy, **privacy)
    )
    run.write_text("config.json", configs.to_json(config))
    run.write_json("eval.json", {"utility": utility, "class_agreement": 0.5, "frechet_distance": 4.0})
    return str(path)


def compared(first, *more):
    return cli_utility.compare(argparse.Namespace(subject=first, more=list(more)))


def test_every_way_to_spend_a_budget_has_a_row(tmp_path):
    runs = [finished(tmp_path / "a", 0.7), finished(tmp_path / "b", 0.8)]
    runs += [finished(tmp_path / "c", 0.3, noise_multiplicity=1, epsilon=1.0)]
    rows = [line.strip("| ").split(" | ") for line in compared(*runs).splitlines() if line.startswith("| ")][1:]
    assert rows[0] == ["samples of DP-SGD, noise multiplicity 1", "1", "0.300", "0.500", "4.000", "1 run"]
    assert (
        rows[1][:3] == ["samples of DP-SGD, noise multiplicity 16", "10", "0.750 (0.700 to 0.800)"]
        and rows[1][-1] == "2 runs"
    )
    gaussians = {row[1]: float(row[2].split()[0]) for row in rows if "Gaussians" in row[0]}
    assert list(gaussians) == ["1", "10"] and 0.7 < gaussians["1"] < gaussians["10"]
    worth = {row[0]: float(row[2]) for row in rows[-2:]}
    assert 0.4 < worth["the public images that the runs begin with"] < 0.9
    assert worth["the training images, without privacy"] == pytest.approx(0.966, abs=5e-4)
    frechet = {row[0]: float(row[4].split()[0]) for row in rows}
    assert frechet["the training images, without privacy"] < frechet["samples of noised Gaussians, one a class"]
    assert gaussians["10"] < worth["the training images, without privacy"]


def test_what_cannot_stand_beside_the_others_is_refused(tmp_path):
    first = finished(tmp_path / "a", 0.7)
    refusals = {"is not a private run": dict(epsilon=None), "another data set or privacy.delta than": dict(delta=1e-5)}
    for words, changes in refusals.items():
        with pytest.raises(UserError, match=words):
            compared(first, finished(tmp_path / "other", 0.5, **changes))
    other = finished(tmp_path / "other", 0.5)
    RunDirectory(other).write_text("config.json", configs.to_json(dataclasses.replace(CONFIG, init_from=None)))
    with pytest.raises(UserError, match="has another init_from or train.trainable than"):
        compared(first, other)
    RunDirectory(first).write_json("eval.json", {"utility": 0.7})
    with pytest.raises(UserError, match="no class_agreement in it, it is old: `dito eval"):
        compared(first)
    RunDirectory(first).evaluation.unlink()
    with pytest.raises(UserError, match="no eval.json yet; `dito eval"):
        compared(first)
