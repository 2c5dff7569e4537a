"""What the host does about bad steps: it counts them, says so, and goes back to before a burst of them.

The device judges each step (health.py), and the host hears of it two steps later, so that it never waits for a step
that has nothing queued behind it. A rollback restores the last checkpoint from before the burst, and from there on
the data are those that come after it: skips.json records how many batches are passed over, and where.
"""

import collections
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dito_jax.checkpointing.checkpoint import Checkpoints, DamagedCheckpoint
from dito_jax.distributed import agree
from dito_jax.errors import UserError
from dito_jax.resilience.replicas import differing, odd_devices
from dito_jax.telemetry.events import Events
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.health import FINE, GRADIENT_SPIKE, LOSS_SPIKE, NOT_FINITE, GuardConfig
from dito_jax.training.state import TrainState


LAG = 2  # steps that are queued before the host asks what the first of them came to
WORDS = {
    NOT_FINITE: "its loss or gradient is not finite",
    LOSS_SPIKE: "its loss {loss:.4g} is a spike",
    GRADIENT_SPIKE: "the norm of its gradient {gradient_norm:.4g} is a spike",
}


class Guard:
    """Watches the steps of one run."""

    def __init__(self, config: GuardConfig, run: RunDirectory, events: Events, *, first: int = 0):
        self.config, self._run, self._events = config, run, events
        self._waiting: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._bad: list[int] = []  # the latest bad steps
        self._alike = first  # the last step after which devices were seen to agree
        self._apart = False  # and whether they were seen not to, since

    def watch(self, number: int, measured: dict[str, jax.Array]) -> None:
        """Takes note of a step that was queued, and waits for the one LAG before it."""
        self._waiting.append((number, measured))
        if len(self._waiting) > LAG:
            self._settle()

    def settle(self) -> None:
        """Waits for all steps that were queued."""
        while self._waiting:
            self._settle()

    def burst(self) -> bool:
        """Whether there were so many bad steps of late, or devices that differ, that the run should go back."""
        return self._apart or len(self._bad) >= self.config.burst

    def is_bad(self, measured: dict[str, jax.Array]) -> bool:
        """Whether a step was; waits for it."""
        return int(measured["bad"]) != FINE

    def compare(self, number: int, measured: dict[str, jax.Array], again: dict[str, jax.Array]) -> None:
        """Says what the second run of a bad step, from the same state and data, tells about the first."""
        told = WORDS[int(measured["bad"])].format(**{name: float(value) for name, value in measured.items()})
        if self.is_bad(again):
            self._events.record("reproduced", f"step {number} was run again: {told} both times, so not by chance.")
        else:
            said = f"step {number}: {told}, but not when it was run again: a passing fault of the hardware? It counts."
            self._events.record("transient", said, step=number, devices=[str(d) for d in jax.local_devices()])

    def compare_replicas(self, number: int, state: TrainState) -> None:
        """Where copies of a parameter differ, no step since the last comparison is to be trusted."""
        self.settle()
        leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
        apart = differing(leaves)
        if not apart:
            self._alike = number
            return
        devices = sorted({device for name in apart for device in odd_devices(leaves[name])})
        said = (
            f"step {number}: devices that should hold {apart[0]} alike do not, and so with {len(apart) - 1} more; they "
            f"did after step {self._alike}. Here {', '.join(devices) or 'none'} differs from the others: look at it."
        )
        self._events.record("divergence", said, step=number, devices=devices)
        self._apart = True

    def roll_back[Tree](
        self, number: int, checkpoints: Checkpoints, like: Tree, on_damage: Callable[[int, DamagedCheckpoint], None]
    ) -> tuple[int, Tree]:
        """Back to the last checkpoint before the burst that ended by step `number`: its step, and its state.

        Raises:
          UserError: there is none, or the run has been there too often.
        """
        self.settle()
        first, cure = self._bad[0] if self._bad else number, "lower optimizer.learning_rate, look at the data"
        trouble = f"{len(self._bad)} of the steps {first} to {number} were bad ({self._run.events.name} has each)"
        if self._apart:
            first, cure = self._alike + 1, f"take out the device that {self._run.events.name} names"
            trouble = f"devices came to differ in one of the steps {first} to {number}"
        checkpoints.wait()
        restored = checkpoints.restore_newest(like, on_damage, before=first)
        if restored is None:
            raise UserError(f"{trouble}, before the first checkpoint: {cure}.")
        target, state = restored
        past = skips(self._run)
        before = sum(skip["after"] == target for skip in past)
        agree(True)  # all have read it before one writes
        if before >= self.config.rollbacks:
            raise UserError(
                f"{trouble}, after {before} rollbacks to step {target}: {cure}, or allow more with guard.rollbacks; "
                f"step {target} is intact."
            )
        batches = number - target
        said = (
            f"{trouble}: back to step {target}, past the {batches} batches since "
            f"(rollback {before + 1} of {self.config.rollbacks} to it)."
        )
        # First of all, so that a run that is killed from here on goes the same way.
        self._run.write_json(self._run.skips.name, [*past, {"after": target, "batches": batches, "because": said}])
        agree(True)  # all will read it
        for step in [step for step in checkpoints.steps() if step > target]:
            checkpoints.set_aside(step, "abandoned")
        self._events.record("rollback", said, step=number, to=target, batches=batches)
        self._bad.clear()
        self._alike, self._apart = target, False
        return target, state

    def _settle(self) -> None:
        number, measured = self._waiting.popleft()
        bad = int(measured["bad"])
        self._bad = [step for step in self._bad if step > number - self.config.burst_window]
        if bad != FINE:
            values = {name: float(measured[name]) for name in ("loss", "gradient_norm")}
            said = f"step {number} left out: {WORDS[bad].format(**values)}."
            self._events.record("bad_step", said, step=number, **{k: repr(v) for k, v in values.items()})
            self._bad.append(number)


def step_back(state: TrainState) -> TrainState:
    """The state before a bad step, which changed nothing but the count."""
    return dataclasses.replace(state, step=jax.device_put(np.asarray(state.step) - 1, state.step.sharding))


def skips(run: RunDirectory) -> list[dict[str, Any]]:
    """[{"after": step, "batches": number, "because": why}]: where batches were passed over."""
    return json.loads(run.skips.read_text()) if run.skips.exists() else []


def position(run: RunDirectory, step: int) -> int:
    """The batch that comes after `step` steps: that many, and those passed over on the way."""
    return step + sum(skip["batches"] for skip in skips(run) if skip["after"] <= step)
