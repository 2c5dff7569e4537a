"""NaN and loss-spike handling: skip the update, log it, roll back after repeated bad steps.

The device decides whether a step is bad and skips its update (training/health.py). The host reads the result two steps
later, so that the device always has a step queued. A rollback restores the last checkpoint from before the bad steps
and skips the batches since then (skips.py).
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable

import jax
import numpy as np

from dito_jax.checkpointing.checkpoint import Checkpoints, DamagedCheckpoint
from dito_jax.checkpointing.checksums import array_checksums
from dito_jax.distributed import agree, collected, count, same
from dito_jax.errors import UserError
from dito_jax.resilience.replicas import differing, odd_devices
from dito_jax.resilience.skips import position, roll_back_to, skips
from dito_jax.telemetry.events import Events
from dito_jax.telemetry.run_directory import RunDirectory
from dito_jax.training.health import FINE, GRADIENT_SPIKE, LOSS_SPIKE, NOT_FINITE, GuardConfig
from dito_jax.training.state import TrainState


LAG = 2  # number of steps queued after a step before the host reads its metrics
WORDS = {
    NOT_FINITE: "loss or gradient not finite",
    LOSS_SPIKE: "loss spike ({loss:.4g})",
    GRADIENT_SPIKE: "gradient norm spike ({gradient_norm:.4g})",
}


class Guard:
    """Logs and counts the bad steps of one run, and rolls back."""

    def __init__(self, config: GuardConfig, run: RunDirectory, events: Events, *, first: int = 0):
        self.config, self._run, self._events = config, run, events
        self._waiting: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._bad: list[int] = []  # the latest bad steps
        self._last_equal = first  # the last step after which all replicas were equal
        self._last_same = first  # the last step after which all processes had the same values
        self._equal_until: int | None = None  # replicas were found to differ; they were equal after this step

    def watch(self, number: int, measured: dict[str, jax.Array]) -> None:
        """Adds the metrics of a queued step; waits for the step LAG before it."""
        self._waiting.append((number, measured))
        if len(self._waiting) > LAG:
            self._settle()

    def settle(self) -> None:
        """Waits for all queued steps."""
        while self._waiting:
            self._settle()

    @property
    def diverged(self) -> bool:
        """Whether replicas were found to differ, so that the state must not be saved."""
        return self._equal_until is not None

    def burst(self) -> bool:
        """Whether the run should roll back: after `guard.burst` bad steps, or when replicas differ."""
        return self.diverged or len(self._bad) >= self.config.burst

    def is_bad(self, measured: dict[str, jax.Array]) -> bool:
        """Whether a step was bad; waits for it."""
        return int(measured["bad"]) != FINE

    def compare(self, number: int, measured: dict[str, jax.Array], again: dict[str, jax.Array]) -> None:
        """Logs whether the rerun of a bad step, with the same state and data, gave the same result."""
        reason = WORDS[int(measured["bad"])].format(**{name: float(value) for name, value in measured.items()})
        if self.is_bad(again):
            self._events.record("reproduced", f"step {number}: {reason} again when rerun, so it is reproducible.")
        else:
            said = f"step {number}: {reason}, but not when rerun: suspected transient hardware error. The rerun counts."
            self._events.record("transient", said, step=number, devices=[str(d) for d in jax.local_devices()])

    def compare_replicas(self, number: int, state: TrainState) -> None:
        """Compares the replicas of the state; if some differ, logs it and requests a rollback."""
        self.settle()
        leaves = _by_name(state)
        diverged = differing(leaves)
        if not diverged:
            self._last_equal = number
            return
        devices = sorted({device for name in diverged for device in odd_devices(leaves[name])})
        said = (
            f"step {number}: replica divergence (silent data corruption) in {diverged[0]} and {len(diverged) - 1} more "
            f"arrays; they were equal after step {self._last_equal}. Differing devices of this process: "
            f"{', '.join(devices) or 'none'}. Check the hardware."
        )
        self._events.record("divergence", said, step=number, devices=devices)
        self._equal_until = self._last_equal

    def compare_processes(self, number: int, state: TrainState) -> bool:
        """Whether the state may be saved: all processes have the same values. All must call it.

        If some differ, logs it and requests a rollback. Costs one read of the state; nothing in a single process.
        """
        if count() == 1 or self.diverged:
            return not self.diverged
        sums = array_checksums(_by_name(state))
        values = b"".join(map(bytes.fromhex, sums.values()))
        if same(hashlib.sha256(values).digest()):
            self._last_same = number
            return True
        found = collected(np.frombuffer(values, np.uint8).reshape(len(sums), -1))  # process, array, byte
        differ = np.any(found != found[0], axis=(0, 2))
        names = [name for name, differs in zip(sums, differ, strict=True) if differs]
        of_first = [each[list(sums).index(names[0])].tobytes() for each in found]
        usual = collections.Counter(of_first).most_common(1)[0][0]
        odd = ", ".join(str(process) for process, each in enumerate(of_first) if each != usual)
        said = (
            f"step {number}: the processes differ in {names[0]} and {len(names) - 1} more arrays (process {odd} "
            f"from the others); they were equal after step {self._last_same}. The step is not saved. Check the "
            "hardware, and that all processes run the same program."
        )
        self._events.record("divergence", said, step=number, processes=odd)
        self._equal_until = self._last_same
        return False

    def roll_back[Tree](
        self, number: int, checkpoints: Checkpoints, like: Tree, on_damage: Callable[[int, DamagedCheckpoint], None]
    ) -> tuple[int, Tree]:
        """Rolls back to the last checkpoint before the bad steps up to `number`; returns its step and state.

        Raises:
          UserError: there is no such checkpoint, or the run was rolled back to it `guard.rollbacks` times already.
        """
        self.settle()
        first, cure = self._bad[0] if self._bad else number, "lower optimizer.learning_rate, or check the data"
        trouble = f"{len(self._bad)} of the steps {first} to {number} were bad (listed in {self._run.events.name})"
        if self._equal_until is not None:
            first, cure = self._equal_until + 1, f"remove the device or process named in {self._run.events.name}"
            trouble = f"replicas diverged in one of the steps {first} to {number}"
        checkpoints.wait()
        damaged: list[tuple[int, DamagedCheckpoint]] = []
        restored = checkpoints.restore_newest(like, lambda *each: damaged.append(each), before=first)
        if restored is None:
            raise UserError(f"{trouble}, before the first checkpoint: {cure}.")
        for each in damaged:  # only now: if no step is intact, none is set aside
            on_damage(*each)
        target, state = restored
        before = sum(skip["after"] == target for skip in skips(self._run))
        if before >= self.config.rollbacks:
            raise UserError(
                f"{trouble}, after {before} rollbacks to step {target}: {cure}, or increase guard.rollbacks; "
                f"the checkpoint of step {target} is intact."
            )
        batches = position(self._run, number) - position(self._run, target)
        said = (
            f"{trouble}: rolled back to step {target}, skipping the {batches} batches since "
            f"(rollback {before + 1} of {self.config.rollbacks} to this step)."
        )
        agree(True)  # barrier: all processes have read skips.json before one writes it
        roll_back_to(
            self._run, checkpoints, self._events, number=number, target=target, batches=batches, because=said
        )  # fmt: skip
        self._bad.clear()
        self._last_equal, self._last_same, self._equal_until = target, target, None
        return target, state

    def _settle(self) -> None:
        number, measured = self._waiting.popleft()
        bad = int(measured["bad"])
        self._bad = [step for step in self._bad if step > number - self.config.burst_window]
        if bad != FINE:
            values = {name: float(measured[name]) for name in ("loss", "gradient_norm")}
            said = f"step {number} skipped: {WORDS[bad].format(**values)}."
            self._events.record("bad_step", said, step=number, **{k: repr(v) for k, v in values.items()})
            self._bad.append(number)


def _by_name(state: TrainState) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def step_back(state: TrainState) -> TrainState:
    """The state before a bad step: a bad step changes only the step count."""
    return dataclasses.replace(state, step=jax.device_put(np.asarray(state.step) - 1, state.step.sharding))
