"""Monitoring during training: validation loss and sample grids every so many steps, from the EMA parameters.

Nothing of the train state is changed and no random number of training is used, so a run with monitoring ends with the
same bits as one without.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from dito_jax.distributed import agree
from dito_jax.evaluation.monitoring_config import MonitoringConfig
from dito_jax.evaluation.pixels import as_rgb, visible
from dito_jax.evaluation.plots import grid_pixels, save_png
from dito_jax.evaluation.sample import balanced_labels
from dito_jax.evaluation.validation_loss import ValidationLoss
from dito_jax.telemetry.logger import MetricsLogger
from dito_jax.telemetry.metrics import read_metrics
from dito_jax.telemetry.progress import MakeMeter, ProgressMeter
from dito_jax.telemetry.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Measures and draws what `config` asks for. Every process calls it, process 0 writes.

    A stop signal (`interrupted`) ends it after the current batch of images, and nothing is written.
    """

    config: MonitoringConfig
    run: RunDirectory
    draw: Callable[[nnx.State, Sequence[int], int], Iterator[np.ndarray]]  # a make_batch_sampler
    validation: ValidationLoss | None
    num_classes: int
    seed: int
    meter: MakeMeter = ProgressMeter
    interrupted: Callable[[], bool] = lambda: False

    def due(self, step: int) -> bool:
        """Whether there is something to do after `step`."""
        return self._measures(step) or self._draws(step)

    def missed(self, step: int) -> bool:
        """Whether a run that was stopped right after it saved `step` has not done it yet; a collective."""
        if not self.due(step):
            return False
        if self._measures(step):  # which is done last
            done = any(row["step"] == step and "validation_loss" in row for row in read_metrics(self.run))
        else:
            done = self._picture(step).exists()
        return not agree(done or not self.run.writes)  # process 0 knows what was written

    def __call__(self, step: int, params: nnx.State, logger: MetricsLogger) -> None:
        """Writes samples/step_<step>.png and logs it as an image, then logs the validation loss."""
        if self._draws(step):
            labels = balanced_labels(self.config.num_samples, self.num_classes)
            images = self._all("sampling", len(labels), self.draw(params, labels, self.seed))
            if images is not None and self.run.writes:
                grid = grid_pixels(visible(images))
                save_png(grid, self._picture(step))
                logger.image(step, "samples", as_rgb(grid))
        if self._measures(step):
            assert self.validation is not None
            losses = self._all("validation loss", len(self.validation.times), self.validation.batches(params))
            if losses is not None:
                logger.write(step, self.validation.figures(losses))

    def _all(self, task: str, total: int, batches: Iterator[np.ndarray]) -> np.ndarray | None:
        """All batches as one array; None after a stop signal."""
        found = []
        with self.meter(task, total) as progress:
            for batch in batches:
                if not agree(not self.interrupted()):
                    return None
                found.append(batch)
                progress.add(len(batch))
        return np.concatenate(found)

    def _picture(self, step: int) -> Path:
        return self.run.samples / f"step_{step}.png"

    def _measures(self, step: int) -> bool:
        every = self.config.validation_every
        return self.validation is not None and every > 0 and step > 0 and step % every == 0

    def _draws(self, step: int) -> bool:
        every = self.config.samples_every
        return every > 0 and step > 0 and step % every == 0
