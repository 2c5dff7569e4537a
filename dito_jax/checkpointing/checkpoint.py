"""Checkpoints of a run: written in the background, whole or not at all, restored onto any mesh, and never wrong.

Step N is the directory `N`, which Orbax renames into place when all of it is written. So a run killed at any
moment leaves its last good step, and perhaps a `N.orbax-checkpoint-tmp` that the next save removes. A step that is
not what was saved (integrity.py) is set aside as `N.corrupt`, and the one before it is taken. Reading changes nothing
on the disk: a run can be sampled from while it trains.

The state is stored flat, {path of the leaf: array}, so that what a checkpoint holds does not depend on the
Python classes around it.
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


UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax ends the name of a directory that it is still writing

DEFAULT = CheckpointConfig()


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used, in one line: which, why, and what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was saved."""


class Checkpoints:
    """The steps saved in one directory. The processes of one run save, together; any number read.

    `on_disk(step, path)` is called in process 0, in the background, when all of a step is written.
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
        """Every step that was saved whole, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def latest(self) -> int | None:
        """The last step that was saved whole; None if there is none."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """Where a step is."""
        return self.directory / str(step)

    def save(self, step: int, state: Any, *, metadata: dict[str, Any]) -> None:
        """Begins to save `state` (a pytree of arrays) and `metadata` (JSON).

        When it returns, all are copied: the state may be donated. A step that is there already is left as it is.

        Raises:
          CheckpointError: the disk is full or read-only, now or while the save before this one was being written.
        """
        self.wait()
        if step in self.steps():
            return
        check_best_metric(self._config, metadata.get("metrics"))
        leaves = _by_path(state)
        self._saving = step, sum(leaf.nbytes for leaf in leaves.values())
        record = Record(leaves, metadata | {"time": time.time()})
        # Made in the background, directories keep a process whose save failed before from ending.
        in_turn = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        with self._explained(), ocp.Context(async_options=in_turn):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._remove_unfinished()
                if self._saving[1] > self._free():
                    raise self._refused("measured before writing")
            response = ocp.save_checkpointables_async(str(self.path(step)), {"state": leaves, "record": record})
        self._pending = self._background.submit(self._finish, step, response)

    def wait(self) -> None:
        """Returns when the save in progress is on the disk, and the steps too old to keep are off it.

        Raises:
          CheckpointError: the disk was full. Nothing is left of the step; those before it are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._explained():
                pending.result()

    def close(self) -> None:
        """Waits for the save in progress; saves no more."""
        try:
            self.wait()
        finally:
            self._background.shutdown()

    def restore[Tree](self, step: int, like: Tree) -> Tree:
        """The state of `step`, laid out as `like`: `jax.ShapeDtypeStruct`s, on shardings of any mesh.

        Raises:
          CheckpointError: there is no such step, or it is of another model.
          DamagedCheckpoint: it is not what was saved.
        """
        wanted = _by_path(like)
        self._find(step)
        with self._damage_told(step):
            record, state = self._load(step, wanted)
            if self._config.verify == "full":
                check_values(state, record)
        return jax.tree.unflatten(jax.tree.structure(like), [state[name] for name in wanted])

    def restore_newest[Tree](
        self, like: Tree, on_damage: Callable[[int, DamagedCheckpoint], None], *, before: int | None = None
    ) -> tuple[int, Tree] | None:
        """The newest step, of those `before` one, that is what was saved, and its state; None if there are none.

        `on_damage(step, error)` hears of each newer one that is not.

        Raises:
          DamagedCheckpoint: there are steps, and none is good.
          CheckpointError: they are of another model.
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
        """Renames a step to `N.<why>`, so that it is kept and not taken for good; in all processes at once."""
        self.wait()
        names = [f"{step}.{why}", *(f"{step}.{why}-{number}" for number in range(2, 1000))]
        aside = next(path for name in names if not (path := self.directory / name).exists())
        agree(True)  # on the name, before it is taken
        if jax.process_index() == 0:
            self.path(step).rename(aside)
        agree(True)  # that it is done
        return aside

    def record(self, step: int) -> dict[str, Any]:
        """What `save` recorded: {"arrays": {path: [kind, fingerprint]}, "metadata": what it was given, ...}."""
        self._find(step)
        with self._damage_told(step):
            return read_record(self.path(step))

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given as `metadata`, and "time", seconds since 1970."""
        return self.record(step)["metadata"]

    def _find(self, step: int) -> None:
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; choose from: {there}.")

    def _load(self, step: int, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The record and the arrays. Every process reads for itself, and all agree whether all could."""
        record, state, failed = {}, {}, None
        # Within Orbax's own barriers a process that cannot read would leave the others waiting for it.
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
        except Exception as error:  # whatever Orbax makes of damaged files
            failed = f"it cannot be read: {first_line(error)}"
        if not agree(failed is None):
            raise Damaged(failed or "it cannot be read by another process")
        return record, state

    def _finish(self, step: int, response: Any) -> None:
        """In the background: what follows when a step is on the disk."""
        response.result()
        if jax.process_index() != 0:
            return
        write_sizes(self.path(step))
        saved = {step: self._metric(step) for step in self.steps()}
        for old in superfluous(saved, self._config):
            # Renamed first, so that a kill in the middle leaves no half of a step under its name.
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
        """Removes what a failed save wrote, and says in a line that the disk was full, or closed to us, if it was."""
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
        kept = "no step was saved yet" if self.latest() is None else f"step {self.latest()} is intact"
        return CheckpointError(
            f"{self.directory}: cannot write the checkpoint of step {step} ({reason}): it needs {needed:,} "
            f"bytes, {self._free():,} are free; make room, or use another --run-dir; {kept}."
        )

    @contextlib.contextmanager
    def _damage_told(self, step: int) -> Iterator[None]:
        try:
            yield
        except Damaged as damage:
            earlier = max((s for s in self.steps() if s < step), default=None)
            cure = "use another --run-dir" if earlier is None else f"move it away to go on from step {earlier}"
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
    """SHA-256 in hex of every leaf's path, dtype, shape and bytes, in the order of the paths.

    Equal for equal bits, however the leaves are sharded; each must be addressable from this process.
    """
    sha = hashlib.sha256()
    for name, leaf in sorted(_by_path(tree).items()):
        values = np.asarray(leaf)
        sha.update(f"{name} {kind(values)}\n".encode())
        sha.update(values.tobytes())
    return sha.hexdigest()


def _by_path(tree: Any) -> dict[str, Any]:
    """{"params/blocks/scale": leaf}, in the tree's own order."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves have one path"
    return named
