"""Checkpoints of a run: asynchronous and atomic saves, checksums, restore onto any mesh.

Step N is the directory `N`, which Orbax renames into place after writing all of it. A run killed at any moment
therefore keeps its last complete step, and perhaps a `N.orbax-checkpoint-tmp` that the next save removes. Old steps are
removed once the new one would survive a power loss. A step whose checksums do not match (checksums.py) is passed over
for the step before it; one that cannot be read at present (failures.py), or is of another step or run (identity.py), is
an error. Reading changes nothing on disk, so a run can be sampled from while it trains.

The state is stored as a flat dict {path of the leaf: array}, so a checkpoint does not depend on Python classes.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dito_jax.checkpointing.checksums import Damaged, Record, kind, read_record, saved_steps, write_sizes
from dito_jax.checkpointing.failures import (
    CheckpointError as CheckpointError,
    DamagedCheckpoint as DamagedCheckpoint,
    Tell,
    UnreadableCheckpoint,
    persistently,
)
from dito_jax.checkpointing.identity import NOBODY, Owner, config_change
from dito_jax.checkpointing.orbax_errors import hush_orbax, refusal
from dito_jax.checkpointing.reading import read_state
from dito_jax.checkpointing.retention import CheckpointConfig, check_best_metric, superfluous
from dito_jax.distributed import agree
from dito_jax.telemetry.run_directory import sync_directory, sync_tree


UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's suffix of a directory that is still being written

DEFAULT = CheckpointConfig()


class Checkpoints:
    """The checkpoints in one directory. All processes of a run save together; any number of processes may read.

    `owner` is recorded in each save and compared with what is restored. `on_disk(step, path)` is called in process 0,
    in the background, after a step is completely written. `on_change(line)` is called if the config of a restored step
    differs from the owner's. `tell` gets lines for the user.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        config: CheckpointConfig = DEFAULT,
        *,
        owner: Owner = NOBODY,
        on_disk: Callable[[int, Path], None] = lambda step, path: None,
        on_change: Callable[[str], None] = lambda line: None,
        tell: Tell = lambda line: None,
    ):
        self.directory = Path(directory).absolute()
        self._config, self.owner = config, owner
        self._on_disk, self._on_change, self._tell = on_disk, on_change, tell
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._saving = (0, 0)  # step and bytes of the last save begun
        hush_orbax()

    def steps(self) -> list[int]:
        """All completely saved steps, ascending."""
        return persistently(self.directory, lambda: saved_steps(self.directory), self._tell)

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
        record = Record(leaves, metadata | {"time": time.time()}, identity=self.owner.identity(step))
        # Directories created asynchronously would keep a process from exiting after a failed save.
        in_turn = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        with self._explained(), ocp.Context(async_options=in_turn):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._remove_unfinished()
                if self._saving[1] > self._free():
                    raise self._refused("not enough free space")
            response = ocp.save_checkpointables_async(str(self.path(step)), {"state": leaves, "record": record})
        self._written = self._identity(step)
        self._pending = self._background.submit(self._finish, step, response)

    def wait(self) -> None:
        """Waits until the save in progress is on disk and the steps that are not kept are deleted.

        Raises:
          CheckpointError: the disk was full. Nothing of the step is left; earlier steps are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._explained(begun=True):
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
          CheckpointError: there is no such step, it is one of another step, run or model, or it cannot be read now.
          DamagedCheckpoint: the step differs from what was saved.
        """
        wanted = _by_path(like)
        self._find(step)
        with self._damage_explained(step):
            record, state = read_state(self.path(step), wanted, self._config.verify, self.owner, self._tell)
        if change := config_change(self.path(step), record, self.owner):
            self._on_change(change)
        return jax.tree.unflatten(jax.tree.structure(like), [state[name] for name in wanted])

    def restore_newest[Tree](
        self, like: Tree, on_damage: Callable[[int, DamagedCheckpoint], None], *, before: int | None = None
    ) -> tuple[int, Tree] | None:
        """Restores the newest intact step, below `before` if given: (step, state); None if there are no steps.

        `on_damage(step, error)` is called for each newer step that is damaged. It should not set the step aside before
        an intact one is found: a run whose steps are all set aside begins again at step 0.

        Raises:
          DamagedCheckpoint: there are steps, but all are damaged.
          CheckpointError: a step is one of another step, run or model, or it cannot be read now.
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
            sync_directory(self.directory)
        agree(True)  # barrier: the rename is done
        return aside

    def record(self, step: int) -> dict[str, Any]:
        """The record of a step: {"arrays": {path: [kind, checksum]}, "metadata": as given to `save`, ...}."""
        self._find(step)
        with self._damage_explained(step):
            return persistently(self.path(step), lambda: read_record(self.path(step)), self._tell)

    def metadata(self, step: int) -> dict[str, Any]:
        """The `metadata` given to `save`, with "time" in seconds since 1970."""
        return self.record(step)["metadata"]

    def _find(self, step: int) -> None:
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; choose from: {there}.")

    def _finish(self, step: int, response: Any) -> None:
        """Runs in the background after a step is written: records file sizes, syncs it, and deletes old steps."""
        response.result()
        if jax.process_index() != 0:
            return
        write_sizes(self.path(step))
        sync_tree(self.path(step))  # before an older step goes: a power loss may empty files that are not synced
        saved: dict[int, float | None] = {}
        with contextlib.suppress(UnreadableCheckpoint):  # nothing is deleted while it is unknown which are the best
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

    def _identity(self, step: int) -> tuple[int, int] | None:
        """Device and inode of the directory that `step` is written into, which Orbax may make again under its name."""
        for path in (self.directory / f"{step}{UNFINISHED}", self.path(step)):
            with contextlib.suppress(OSError):
                status = path.stat()
                return status.st_dev, status.st_ino
        return None

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob(f"*{UNFINISHED}"):
            shutil.rmtree(path)

    @contextlib.contextmanager
    def _explained(self, *, begun: bool = False) -> Iterator[None]:
        """Removes the files of a failed save; raises a CheckpointError if the disk was full or not writable, or if the
        files of a save that had begun were removed by another program.
        """
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            step = self._saving[0]
            lost = begun and self._written is not None and self._identity(step) != self._written
            with contextlib.suppress(OSError):
                self._remove_unfinished()
            if reason := refusal(error):
                raise self._refused(reason) from error
            if lost:
                raise CheckpointError(
                    f"{self.directory}: the files of the checkpoint of step {step} were removed or renamed while they "
                    "were written: stop what does that, then run the same command again."
                ) from error
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


def set_aside_steps(directory: Path) -> list[Path]:
    """The directories of all steps that `set_aside` has renamed, by step."""
    names = re.compile(r"(\d+)\.(corrupt|abandoned)(-\d+)?")
    found = [path for path in directory.iterdir() if names.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found, key=lambda path: (int(path.name.split(".")[0]), path.name))


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
