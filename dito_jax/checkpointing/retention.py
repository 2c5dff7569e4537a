"""Checkpoint schedule and retention: which steps are saved, and which saved steps are kept."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Literal

from dito_jax.distributed import agree
from dito_jax.errors import UserError


Verification = Literal["full", "fast", "off"]  # see CheckpointConfig.verify


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often checkpoints are saved, which of them are kept, and how they are verified on restore."""

    every: int = 500
    """Save a checkpoint every this many steps; the last step is always saved."""
    every_seconds: float | None = None
    """Also save when this many seconds have passed since the last save, checked at log intervals; None: never."""
    keep: int = 3
    """Number of most recent checkpoints to keep."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this; None: no others."""
    keep_best: int = 0
    """Also keep this many checkpoints with the lowest best_metric."""
    best_metric: str = "loss"
    """Metric for keep_best: its mean over the last log interval before the save."""
    verify: Verification = "full"
    """Check when restoring: checksums (full), file sizes only, which misses flipped bits (fast), or neither (off)."""


def superfluous(saved: Mapping[int, float | None], config: CheckpointConfig) -> list[int]:
    """The saved steps to delete; `saved` maps each step to its best_metric, or None if unknown."""
    steps = sorted(saved)
    known = {step: value for step, value in saved.items() if value is not None and not math.isnan(value)}
    best = sorted(known, key=lambda step: (known[step], -step))[: config.keep_best]
    periodic = [step for step in steps if config.keep_every and step % config.keep_every == 0]
    stay = {*steps[-config.keep :], *best, *periodic}
    return [step for step in steps if step not in stay]


def check_best_metric(config: CheckpointConfig, measured: Mapping[str, float] | None) -> None:
    """Raises UserError if keep_best is set and best_metric is not among the measured metrics."""
    if config.keep_best and measured and config.best_metric not in measured:
        known = ", ".join(measured)
        raise UserError(f"checkpoint.best_metric {config.best_metric!r} is not measured; choose from {known}.")


class SaveClock:
    """Decides when a save is due; checks the time every `look_every` steps."""

    def __init__(self, config: CheckpointConfig, look_every: int, clock: Callable[[], float] = time.monotonic):
        self._config, self._look_every, self._clock, self._saved_at = config, look_every, clock, clock()

    def due(self, step: int) -> bool:
        """Whether to save after `step`; a collective, with the same result in all processes."""
        if step % self._config.every == 0:
            return True
        seconds = self._config.every_seconds
        if seconds is None or step % self._look_every:
            return False
        return not agree(self._clock() - self._saved_at < seconds)

    def saved(self) -> None:
        """Restarts the time since the last save."""
        self._saved_at = self._clock()
