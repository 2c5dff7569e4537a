"""Checkpoints of a run: asynchronous and atomic saves, checksums, restore onto any mesh.

Step N is the directory `N`, which Orbax renames into place after writing all of it. A run killed at any moment
therefore keeps its last complete step, and perhaps a `N.orbax-checkpoint-tmp` that the next save removes. A step whose
checksums do not match (checksums.py) is renamed to `N.corrupt`, and the step before it is restored. Reading changes
nothing on disk, so a run can be sampled from while it trains.

The state is stored as a flat dict {path of the leaf: array}, so a checkpoint does not depend on Python classes.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dito_jax.checkpointing.checksums import Damaged, Record, check_sizes, check_values, kind, read_record, write_sizes
from dito_jax.checkpointing.orbax_errors import first_line, hush_orbax, refusal
from dito_jax.checkpointing.retention import CheckpointConfig, check_best_metric, superfluous
from dito_jax.distributed import agree
from dito_jax.errors import UserError


UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's suffix of a directory that is still being written

DEFAULT = CheckpointConfig()


class CheckpointError(UserError):
    """A checkpoint cannot be written or used; one line says which, why, and what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint differs from what was saved."""


class Checkpoints:
    """The checkpoints in one directory. All processes of a run save together; any number of processes may read.

    `on_disk(step, path)` is called in process 0, in the background, after a step is completely written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        config: CheckpointConfig = DEFAULT,
        *,
        on_disk: Callable[[int, Path], None] = lambda step, path: None,
    ):
        self.directory = Path(directory).absolute()
        self._config, self._on_disk = config, on_disk
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._saving = (0, 0)  # step and bytes of the last save begun
        hush_orbax()

    def steps(self) -> list[int]:
        """All completely saved steps, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def latest(self) -> int | None:
        """The last completely saved step; None if there is none."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """The directory of a step."""
        return self.directory / str(step)

    def save(self, step: int, state: Any, *, metadata: dict[str, Any]) -> None:
        """Starts to save `state` (a pytree of arrays) and `metadata` (JSON) in the background.

        When it returns, the arrays are copied and may be donated. A step that is saved already is not saved again.

        Raises:
          CheckpointError: the disk is full or read-only, now or during the previous save.
        """
        self.wait()
        if step in self.steps():
            return
        check_best_metric(self._config, metadata.get("metrics"))
        leaves = _by_path(state)
        self._saving = step, sum(leaf.nbytes for leaf in leaves.values())
        record = Record(leaves, metadata | {"time": time.time()})
        # Directories created asynchronously would keep a process from exiting after a failed save.
        in_turn = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        with self._explained(), ocp.Context(async_options=in_turn):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._remove_unfinished()
                if self._saving[1] > self._free():
                    raise self._refused("not enough free space")
            response = ocp.save_checkpointables_async(str(self.path(step)), {"state": leaves, "record": record})
        self._pending = self._background.submit(self._finish, step, response)

    def wait(self) -> None:
        """Waits until the save in progress is on disk and the steps that are not kept are deleted.

        Raises:
          CheckpointError: the disk was full. Nothing of the step is left; earlier steps are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._explained():
                pending.result()

    def close(self) -> None:
        """Waits for the save in progress and ends the background thread."""
        try:
            self.wait()
        finally:
            self._background.shutdown()

    def restore[Tree](self, step: int, like: Tree) -> Tree:
        """Restores the state of `step` with the structure and shardings of `like` (ShapeDtypeStructs on any mesh).

        Raises:
          CheckpointError: there is no such step, or its arrays are those of another model.
          DamagedCheckpoint: the step differs from what was saved.
        """
        wanted = _by_path(like)
        self._find(step)
        with self._damage_explained(step):
            record, state = self._load(step, wanted)
            if self._config.verify == "full":
                check_values(state, record)
        return jax.tree.unflatten(jax.tree.structure(like), [state[name] for name in wanted])

    def restore_newest[Tree](
        self, like: Tree, on_damage: Callable[[int, DamagedCheckpoint], None], *, before: int | None = None
    ) -> tuple[int, Tree] | None:
        """Restores the newest intact step, below `before` if given: (step, state); None if there are no steps.

        `on_damage(step, error)` is called for each newer step that is damaged.

        Raises:
          DamagedCheckpoint: there are steps, but all are damaged.
          CheckpointError: the arrays are those of another model.
        """
        last = None
        for step in reversed([step for step in self.steps() if before is None or step < before]):
            try:
                return step, self.restore(step, like)
            except DamagedCheckpoint as error:
                on_damage(step, last := error)
        if last is not None:
            raise last
        return None

    def set_aside(self, step: int, why: str) -> Path:
        """Renames a step to `N.<why>`, so that it is kept but not restored; all processes must call it."""
        self.wait()
        names = [f"{step}.{why}", *(f"{step}.{why}-{number}" for number in range(2, 1000))]
        aside = next(path for name in names if not (path := self.directory / name).exists())
        agree(True)  # barrier: all processes have chosen the same name before the rename
        if jax.process_index() == 0:
            self.path(step).rename(aside)
        agree(True)  # barrier: the rename is done
        return aside

    def record(self, step: int) -> dict[str, Any]:
        """The record of a step: {"arrays": {path: [kind, checksum]}, "metadata": as given to `save`, ...}."""
        self._find(step)
        with self._damage_explained(step):
            return read_record(self.path(step))

    def metadata(self, step: int) -> dict[str, Any]:
        """The `metadata` given to `save`, with "time" in seconds since 1970."""
        return self.record(step)["metadata"]

    def _find(self, step: int) -> None:
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; choose from: {there}.")

    def _load(self, step: int, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the record and the arrays; raises in all processes if one of them cannot read."""
        record, state, failed = {}, {}, None
        # Each process reads without Orbax's barriers, in which the others would wait for a process that fails.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        try:
            record = read_record(self.path(step))
            self._compare(step, record, wanted)
            if self._config.verify != "off":
                check_sizes(self.path(step))
            with ocp.Context(multiprocessing_options=alone):
                state = ocp.load(str(self.path(step)), wanted, checkpointable_name="state")
        except CheckpointError:
            raise
        except Damaged as damage:
            failed = str(damage)
        except Exception as error:  # Orbax raises many types for damaged files
            failed = f"it cannot be read: {first_line(error)}"
        if not agree(failed is None):
            raise Damaged(failed or "it cannot be read by another process")
        return record, state

    def _finish(self, step: int, response: Any) -> None:
        """Runs in the background after a step is on disk: records file sizes and deletes old steps."""
        response.result()
        if jax.process_index() != 0:
            return
        write_sizes(self.path(step))
        saved = {step: self._metric(step) for step in self.steps()}
        for old in superfluous(saved, self._config):
            # Renamed first, so that a kill during the deletion leaves no incomplete step under its name.
            self.path(old).rename(doomed := self.directory / f"{old}{UNFINISHED}")
            shutil.rmtree(doomed)
        self._on_disk(step, self.path(step))

    def _metric(self, step: int) -> float | None:
        if not self._config.keep_best:
            return None
        with contextlib.suppress(DamagedCheckpoint):
            return self.metadata(step).get("metrics", {}).get(self._config.best_metric)
        return None

    def _free(self) -> int:
        there = next(path for path in (self.directory, *self.directory.parents) if path.exists())
        return shutil.disk_usage(there).free

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob(f"*{UNFINISHED}"):
            shutil.rmtree(path)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Removes the files of a failed save; raises a CheckpointError if the disk was full or not writable."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            with contextlib.suppress(OSError):
                self._remove_unfinished()
            if reason := refusal(error):
                raise self._refused(reason) from error
            raise

    def _refused(self, reason: str) -> CheckpointError:
        step, needed = self._saving
        kept = "no step was saved before" if self.latest() is None else f"step {self.latest()} is intact"
        return CheckpointError(
            f"{self.directory}: cannot write the checkpoint of step {step} ({reason}): it needs {needed:,} "
            f"bytes, {self._free():,} are free; free some space, or use another --run-dir; {kept}."
        )

    @contextlib.contextmanager
    def _damage_explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except Damaged as damage:
            earlier = max((s for s in self.steps() if s < step), default=None)
            cure = "use another --run-dir" if earlier is None else f"move it away to continue from step {earlier}"
            raise DamagedCheckpoint(f"{self.path(step)}: damaged ({damage}): {cure}.") from damage

    def _compare(self, step: int, record: dict[str, Any], wanted: dict[str, Any]) -> None:
        found = {name: kind for name, (kind, _) in record["arrays"].items()}
        for name in [*wanted, *found]:
            there, here = found.get(name, "absent"), kind(wanted.get(name))
            if there != here:
                raise CheckpointError(
                    f"{self.path(step)}: {name} is {there} in this checkpoint and {here} in this config: "
                    "use another --run-dir, or the config that the checkpoint was made with."
                )


def digest(tree: Any) -> str:
    """SHA-256 in hex of the path, dtype, shape and bytes of every leaf, in the order of the paths.

    It does not depend on the sharding. All leaves must be addressable from this process.
    """
    sha = hashlib.sha256()
    for name, leaf in sorted(_by_path(tree).items()):
        values = np.asarray(leaf)
        sha.update(f"{name} {kind(values)}\n".encode())
        sha.update(values.tobytes())
    return sha.hexdigest()


def _by_path(tree: Any) -> dict[str, Any]:
    """A flat dict {"params/blocks/scale": leaf}, in the order of the tree."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves have one path"
    return named
