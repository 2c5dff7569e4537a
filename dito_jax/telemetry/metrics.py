"""Metrics files of a run: metrics.jsonl and TensorBoard event files."""

import contextlib
import json
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from dito_jax.telemetry.run_directory import RunDirectory, explained, json_lines
from dito_jax.telemetry.tensorboard import TensorBoard


class MetricsWriter:
    """Writes the metrics of the steps after step `after`, the restored one; None for a new run.

    metrics.jsonl has one JSON object per line, `{"step": 20, "loss": 0.31}`, flushed at once. Lines of steps beyond
    `after` from an earlier start, and an unfinished last line, are removed, so that no step appears twice. NaN and
    infinities are written in the form that Python's json module writes and reads.
    """

    def __init__(self, run: RunDirectory, *, after: int | None = None):
        self._run = run
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

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Writes an image to TensorBoard."""
        self._board.image(step, name, image)

    def rewind(self, step: int) -> None:
        """Removes the metrics of steps beyond `step`, which will be repeated after a rollback."""
        self.close()
        self._open(step + 1)

    def close(self) -> None:
        """Closes both files."""
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

    def close(self) -> None:
        """Does nothing."""


def read_metrics(run: RunDirectory) -> list[dict]:
    """All rows of metrics.jsonl that have a step, in order."""
    return json_lines(run.metrics, step=int)
