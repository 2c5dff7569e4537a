"""Reads a run's batches: skipped images become events, and an error of the data ends the run after a checkpoint."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from dito_jax.checkpointing.checkpoint import Checkpoints
from dito_jax.data import DataError, Source
from dito_jax.errors import UserError
from dito_jax.telemetry.events import Events


class BatchReader:
    """Reads batches for the training loop, in the main thread."""

    def __init__(self, source: Source, events: Events, checkpoints: Checkpoints):
        self._unreadable: dict[str, str] = getattr(source, "unreadable", {})
        self._events, self._checkpoints, self._told = events, checkpoints, 0

    def read(self, stream: Iterator[Any], step: int, save: Callable[[int], None]) -> Any:
        """The batch of `step`, the next one of the stream; records an event for each image skipped since the last call.

        If it cannot be read, `save(step - 1)` saves the state so far. In a run of several processes it does not: the
        data may fail in one of them alone, and a checkpoint needs all.

        Raises:
          UserError: the batch cannot be read; one line names the step, the cause and the checkpoint.
        """
        try:
            return next(stream)
        except DataError as error:
            saved = ""
            if jax.process_count() == 1 and step > 1:
                save(step - 1)
                self._checkpoints.close()
                saved = f" Step {step - 1} is saved; the same command goes on from there."
            raise UserError(f"step {step}: {error}{saved}") from error
        finally:
            self._report(step)

    def _report(self, step: int) -> None:
        """Records an event for each image that was skipped since the last call; threads read ahead of `step`."""
        while self._told < len(self._unreadable):  # threads may add some meanwhile
            name, reason = list(self._unreadable.items())[self._told]
            self._told += 1
            said = f"{name}: not a readable image ({reason}): skipped, the next image takes its place."
            self._events.record("unreadable_image", said, step=step, file=name, reason=reason)
