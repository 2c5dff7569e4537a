"""Position of a run in the order of its examples, counted in examples, with what rollbacks skip.

A checkpoint stores the position after its step, so a run that is resumed with another batch size goes on with the
example at which it had stopped: it repeats none and passes over none.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from dito_jax.resilience.skips import skips
from dito_jax.telemetry.run_directory import RunDirectory


EXAMPLES = "examples"  # in the metadata of a checkpoint


class DataPosition:
    """The position of a run whose steps take `batch_size` examples; at first that of a new run."""

    def __init__(self, run: RunDirectory, batch_size: int):
        self._run, self._batch_size = run, batch_size
        self.restore(0, {})

    def restore(self, step: int, metadata: Mapping[str, Any]) -> None:
        """Takes the position of the checkpoint of `step` from its metadata.

        A checkpoint of version 0.2.0 or earlier has no position. All its steps had the batch size of its config.
        """
        config = json.loads(metadata.get("config", "{}"))
        self._before = config.get("train", {}).get("batch_size", self._batch_size)  # batch size of what was saved
        self.step, known = step, metadata.get(EXAMPLES)
        self._examples = step * self._before + self._skipped(0, step) if known is None else known

    def after(self, step: int) -> int:
        """Number of examples that the run has passed by the end of a step, before a rollback to that step skips some.

        `step` is the restored one or a later one.
        """
        return self._examples + (step - self.step) * self._batch_size + self._skipped(self.step, step)

    def stretches(self) -> Iterator[tuple[int, int | None]]:
        """Where the steps after the restored one find their data: (first example, number of steps); None: all further.

        There are several stretches if the run was rolled back to a later step, whose checkpoint is lost.
        """
        later = sorted({entry["after"] for entry in skips(self._run) if entry["after"] > self.step})
        for begin, end in itertools.pairwise([self.step, *later, None]):
            assert begin is not None
            first = self.after(begin) + self._skipped(begin, begin + 1)
            yield first, None if end is None else end - begin

    def first(self) -> int:
        """The first example of the step after the restored one."""
        return next(self.stretches())[0]

    def beyond(self, number: int, target: int, metadata: Mapping[str, Any]) -> int:
        """Number of examples that were passed from the checkpoint of `target`, with its metadata, to step `number`."""
        back = DataPosition(self._run, self._batch_size)
        back.restore(target, metadata)
        return self.after(number) - back.first()

    def _skipped(self, first: int, end: int) -> int:
        """Number of examples that rollbacks to a step in [first, end) have skipped."""
        entries = [entry for entry in skips(self._run) if first <= entry["after"] < end]
        return sum(entry.get(EXAMPLES, entry.get("batches", 0) * self._before) for entry in entries)
