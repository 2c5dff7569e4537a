"""Monitoring: when it is due, what it writes, what it repeats after a stop, and what a private run may not log."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dito_jax.evaluation.monitoring import Monitor, MonitoringConfig
from dito_jax.evaluation.validation_loss import ValidationLoss
from dito_jax.telemetry.logger import MetricsLogger
from dito_jax.telemetry.run_directory import RunDirectory


pytestmark = pytest.mark.recorded


class Log(MetricsLogger):
    """A logger that keeps what it gets; the validation loss also in metrics.jsonl."""

    def __init__(self, run: RunDirectory):
        self._run, self.images = run, []

    def write(self, number, values):
        line = {"step": number, "validation_loss": values["validation_loss"]}
        self._run.append(self._run.metrics, json.dumps(line) + "\n")

    def image(self, number, name, image):
        self.images.append((number, name, image))


def losses(params):
    """Those of three examples."""
    for count in (2, 1):
        yield np.full(count, params["w"], np.float32)


VALIDATION = ValidationLoss(losses, np.array([0.2, 0.5, 0.8], np.float32), np.ones(3, np.float32), 1)
PARAMS = nnx.State({"w": 0.5})


def drawn(params, labels, seed):
    for start in range(0, len(labels), 4):
        shade = [label / 9 * 2 - 1 for label in labels[start : start + 4]]
        yield np.broadcast_to(np.array(shade, np.float32)[:, None, None, None], (len(shade), 8, 8, 1))


@pytest.fixture
def made(tmp_path):
    run = RunDirectory(tmp_path)
    config = MonitoringConfig(validation_every=4, samples_every=6, num_samples=9)
    return run, lambda **changes: Monitor(config, run, drawn, VALIDATION, 10, 0, **changes), Log(run)


def test_each_is_due_at_its_own_steps_and_never_at_zero(made):
    monitor = made[1]()
    assert [step for step in range(14) if monitor.due(step)] == [4, 6, 8, 12]
    off = Monitor(MonitoringConfig(), made[0], drawn, None, 10, 0)
    assert not any(map(off.due, range(14))) and not off.missed(0)
    without_split = Monitor(MonitoringConfig(validation_every=1), made[0], drawn, None, 10, 0)
    assert not any(map(without_split.due, range(14)))


def test_loss_and_grid_are_written_and_repeated_only_if_missing(made):
    run, make, log = made
    monitor = make()
    assert monitor.missed(12) and monitor.missed(6) and not monitor.missed(5)
    monitor(12, PARAMS, log)
    assert run.metrics.read_text() == '{"step": 12, "validation_loss": 0.5}\n'
    assert not monitor.missed(12)
    monitor(6, PARAMS, log)
    assert not monitor.missed(6) and monitor.missed(8)
    with Image.open(run.samples / "step_12.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (3 * 66 + 2, 3 * 66 + 2) and pixels[10, 10] == 0 and pixels[150, 150] == 227  # classes 0, 8
    assert [(step, name, image.shape) for step, name, image in log.images] == [
        (step, "samples", (200, 200, 3)) for step in (12, 6)
    ]


def test_a_stop_signal_ends_it_between_batches_and_nothing_is_written(made):
    run, make, log = made
    answers = iter([False, True, True])
    monitor = make(interrupted=lambda: next(answers))
    monitor(12, PARAMS, log)
    assert not run.metrics.exists() and not run.samples.exists() and not log.images
    assert monitor.missed(12)


@pytest.mark.parametrize(
    ("config", "private", "words"),
    [
        (MonitoringConfig(wandb_project="p"), True, "records the time of each step"),
        (MonitoringConfig(timestep_bins=0), False, "timestep_bins is 0; it must be at least 1"),
        (MonitoringConfig(samples_every=-1), False, "samples_every is -1; wanted"),
        (MonitoringConfig(validation_every=5, samples_every=5), True, None),
        (MonitoringConfig(validation_every=5, wandb_project="p"), False, None),
    ],
)
def test_what_must_not_be_is_said(config, private, words):
    broken = [text for text, is_broken in config.problems(private=private).items() if is_broken]
    assert [words in text for text in broken] == ([True] if words else [])
