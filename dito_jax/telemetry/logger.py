"""Logs metrics every train.log_every steps: metrics.jsonl, TensorBoard, Weights & Biases and a progress line."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from dito_jax.telemetry.metrics import MetricsWriter, NoMetrics
from dito_jax.telemetry.progress import Progress
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.telemetry.throughput import Throughput
from dito_jax.training.health import FINE


class MetricsLogger:
    """Logs the steps after `first`, up to `total`; `rate(n)` is the learning rate of the update after n updates."""

    def __init__(
        self,
        run: RunDirectory,
        *,
        total: int,
        first: int,
        throughput: Throughput,
        rate: Callable[[int], Any],
        compiled: Mapping[str, float | int | bool | None],
        wandb_project: str | None = None,
    ):
        self.means: dict[str, float] = {}  # of the last log interval
        self._throughput, self._rate = throughput, rate
        self._writes = run.writes
        self._pending: list[dict[str, jax.Array]] = []  # still on the device: the host does not wait for the steps
        self._metrics = (MetricsWriter if run.writes else NoMetrics)(
            run, after=first if first else None, wandb_project=wandb_project
        )
        self._progress = Progress(total, step=first)
        if first < total:
            self._metrics.write(first + 1, compiled)

    @property
    def released(self) -> dict[str, float]:
        """`means` without the metrics that a private run must not release (internal_*)."""
        return {name: mean for name, mean in self.means.items() if not name.startswith("internal_")}

    def add(self, measured: dict[str, jax.Array]) -> None:
        """Adds the metrics of one step to the current log interval."""
        self._pending.append(measured)

    def log(self, number: int) -> None:
        """Ends the log interval after step `number`: waits for its steps and logs their means."""
        self.means = means(jax.device_get(self._pending))
        speed = self._throughput.interval(len(self._pending))
        self._pending = []
        rate = {"learning_rate": np.asarray(self._rate(number - 1)).item()}
        self._metrics.write(number, self.means | speed | rate)
        shown = {name: self.means[name] for name in ("loss",) if name in self.means} | speed  # private runs log no loss
        if self._writes:
            self._progress.show(number, {name: value for name, value in shown.items() if value is not None})

    def write(self, number: int, values: Mapping[str, float]) -> None:
        """Logs values of another source than the train step, such as the validation loss, and shows the first."""
        self._metrics.write(number, values)
        if self._writes:
            self._progress.show(number, dict(list(values.items())[:1]))

    def image(self, number: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Logs an image."""
        self._metrics.image(number, name, image)

    def rewind(self, step: int) -> None:
        """Removes the logged metrics of steps beyond `step`, which will be repeated after a rollback."""
        self._pending = []
        self._metrics.rewind(step)
        self._progress.rewind(step)

    def close(self) -> None:
        """Closes the files and the progress bar."""
        self._metrics.close()
        self._progress.close()

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def means(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each metric over the good steps (NaN if there are none), and "bad_steps", the number of bad steps."""
    good = [measured for measured in steps if measured["bad"] == FINE]
    mean = lambda name: float(np.mean([measured[name] for measured in good])) if good else math.nan
    return {name: mean(name) for name in steps[0] if name != "bad"} | {"bad_steps": len(steps) - len(good)}
