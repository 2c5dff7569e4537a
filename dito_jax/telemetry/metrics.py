"""What a run measured: metrics.jsonl for programs, TensorBoard for people."""

import contextlib
import json
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from dito_jax.telemetry.run_directory import RunDirectory, explained, json_lines
from dito_jax.telemetry.tensorboard import TensorBoard


class MetricsWriter:
    """Writes the metrics of the steps that come `after` the restored one; None where a run begins.

    One JSON object a line in metrics.jsonl, `{"step": 20, "loss": 0.31}`, flushed at once. What a
    killed run wrote of steps beyond `after` is dropped, and so is a line that it did not finish: no step is
    told twice. NaN and infinities are written as Python's json writes and reads them.
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
        """One line, and one TensorBoard scalar for each number in it.

        Raises:
          UserError: the disk is full.
        """
        with explained(self._path):
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()
        scalars = {}
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                scalars[name] = value
        self._board.scalars(step, scalars)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """An image for TensorBoard."""
        self._board.image(step, name, image)

    def rewind(self, step: int) -> None:
        """Drops what was written of steps beyond `step`: they will come again."""
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
    """What a process has that is not the one to write: nothing is kept."""

    def _open(self, first: int) -> None:
        del first

    def write(self, step: int, values: Mapping[str, float | int | str | bool | None]) -> None:
        """Nothing."""

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(run: RunDirectory) -> list[dict]:
    """Every whole line of metrics.jsonl, in order; a line that is still being written is left out."""
    return json_lines(run.metrics)
