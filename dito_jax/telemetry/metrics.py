"""Metrics of a run: metrics.jsonl, TensorBoard event files and, on request, Weights & Biases."""

import contextlib
import json
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from dito_jax.telemetry.run_directory import RunDirectory, explained, json_lines
from dito_jax.telemetry.tensorboard import TensorBoard
from dito_jax.telemetry.weights_and_biases import WeightsAndBiases


class MetricsWriter:
    """Writes the metrics of the steps after step `after`, the restored one; None for a new run.

    With `wandb_project` they are also logged to Weights & Biases.

    metrics.jsonl has one JSON object per line, `{"step": 20, "loss": 0.31}`, flushed at once. Lines of steps beyond
    `after` from an earlier start, and an unfinished last line, are removed, so that no step appears twice. NaN and
    infinities are written in the form that Python's json module writes and reads.
    """

    def __init__(self, run: RunDirectory, *, after: int | None = None, wandb_project: str | None = None):
        self._run = run
        # First: if it cannot start, no file has been changed.
        self._wandb = WeightsAndBiases(run, wandb_project) if wandb_project is not None and run.writes else None
        self._open(0 if after is None else after + 1)

    def _open(self, first: int) -> None:
        kept = [json.dumps(row) + "\n" for row in read_metrics(self._run) if row["step"] < first]
        self._path = self._run.write_text(self._run.metrics.name, "".join(kept))
        self._lines = self._path.open("a", encoding="utf-8")
        self._board = TensorBoard(self._run.tensorboard, first=first)

    def write(self, step: int, values: Mapping[str, float | int | str | bool | None]) -> None:
        """Writes one line to metrics.jsonl, and one TensorBoard scalar for each number in it.

        Raises:
          UserError: the disk is full, or the run directory was removed or renamed.
        """
        self._run.check_in_place()
        with explained(self._path):
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()
        scalars = {}
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                scalars[name] = value
        self._board.scalars(step, scalars)
        if self._wandb is not None:
            self._wandb.scalars(step, scalars)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Writes an image to TensorBoard and Weights & Biases."""
        self._board.image(step, name, image)
        if self._wandb is not None:
            self._wandb.image(step, name, image)

    def rewind(self, step: int) -> None:
        """Removes the metrics of steps beyond `step`, which will be repeated after a rollback."""
        self._close_files()
        self._open(step + 1)

    def close(self) -> None:
        """Closes the files, and ends the run of Weights & Biases."""
        self._close_files()
        if self._wandb is not None:
            self._wandb.close()

    def _close_files(self) -> None:
        with contextlib.closing(self._board), explained(self._path):
            self._lines.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoMetrics(MetricsWriter):
    """A MetricsWriter that writes nothing, for the processes that do not log."""

    def _open(self, first: int) -> None:
        del first

    def write(self, step: int, values: Mapping[str, float | int | str | bool | None]) -> None:
        """Does nothing."""

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Does nothing."""

    def rewind(self, step: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_metrics(run: RunDirectory) -> list[dict]:
    """All rows of metrics.jsonl that have a step, in order."""
    return json_lines(run.metrics, step=int)


def last_compile_seconds(run: RunDirectory) -> float | None:
    """How long the last compilation of this run's train step took that was not read from a cache; None if none was."""
    parts = dict.fromkeys(("trace_seconds", "lower_seconds", "compile_seconds"), float)
    rows = [row for row in json_lines(run.metrics, **parts) if not row.get("cache_hit")]
    return sum(rows[-1][part] for part in parts) if rows else None
