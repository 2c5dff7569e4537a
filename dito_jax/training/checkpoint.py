"""Checkpoints of a run: written in the background, whole or not at all, restored onto any mesh.

Step N is the directory `N`, which Orbax renames into place when all of it is written. So a run killed at any
moment leaves its last good step, and perhaps a `N.orbax-checkpoint-tmp` that the next save removes. Reading
changes nothing on the disk: a run can be sampled from while it trains.

The state is stored flat, {path of the leaf: array}, so that what a checkpoint holds does not depend on the
Python classes around it. A file cut short is noticed when it is read; a flipped bit is not: compare `digest`.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dito_jax.errors import UserError


UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax ends the name of a directory that it is still writing
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used, in one line: which, why, and what to do."""


class Checkpoints:
    """The steps saved in one directory, of which the last `keep` stay. One process saves; any number read."""

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3):
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._pending: ocp.AsyncResponse[None] | None = None
        self._saving = (0, 0)  # step and bytes of the last save begun
        _hush_orbax()

    def steps(self) -> list[int]:
        """Every step that was saved whole, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def latest(self) -> int | None:
        """The last step that was saved whole; None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, data: grain.DatasetIterator, *, metadata: dict[str, Any]) -> None:
        """Begins to save `state` (a pytree of arrays), the position of `data`, and `metadata` (JSON).

        When it returns, all are copied: the state may be donated, the iterator advanced. A step that is there
        already is left as it is.

        Raises:
          CheckpointError: the disk is full, now or while the save before this one was being written.
        """
        self.wait()
        if step in self.steps():
            return
        self._remove_unfinished()
        self.directory.mkdir(parents=True, exist_ok=True)
        leaves = _by_path(state)
        self._saving = step, sum(leaf.nbytes for leaf in leaves.values())
        if self._saving[1] > self._free():
            raise self._full("measured before writing")
        # Made in the background, directories keep a process whose save failed before from ending.
        in_turn = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        with self._explained(), ocp.Context(async_options=in_turn):
            self._pending = ocp.save_checkpointables_async(
                str(self._path(step)), {"state": leaves, "data": data}, custom_metadata=metadata
            )

    def wait(self) -> None:
        """Returns when the save in progress is on the disk, and the steps too old to keep are off it.

        Raises:
          CheckpointError: the disk was full. Nothing is left of the step; those before it are intact.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._explained():
            pending.result()
        for step in self.steps()[: -self._keep]:
            # Renamed first, so that a kill in the middle leaves no half of a step under its name.
            self._path(step).rename(doomed := self.directory / f"{step}{UNFINISHED}")
            shutil.rmtree(doomed)

    close = wait

    def restore[Tree](self, step: int, like: Tree, data: grain.DatasetIterator | None = None) -> Tree:
        """The state of `step`, laid out as `like`: `jax.ShapeDtypeStruct`s, on shardings of any mesh.

        `data` is set in place to the position it was saved at.

        Raises:
          CheckpointError: there is no such step, it cannot be read, or it is of another model.
        """
        wanted = _by_path(like)
        self._compare(step, self._read(step, _stored).metadata, wanted)
        state = self._read(step, lambda path: ocp.load(path, wanted, checkpointable_name="state"))
        if data is not None:
            self._read(step, lambda path: ocp.load_checkpointables(path, {"data": data}))
        return jax.tree.unflatten(jax.tree.structure(like), [state[name] for name in wanted])

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given as `metadata`."""
        written: Any = self._read(step, _stored).custom_metadata
        return written or {}

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _free(self) -> int:
        return shutil.disk_usage(self.directory).free

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob(f"*{UNFINISHED}"):
            shutil.rmtree(path)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Removes what a failed save wrote, and says in a line that the disk was full if it was."""
        try:
            yield
        except Exception as error:
            self._remove_unfinished()
            if reason := _no_room(error):
                raise self._full(reason) from error
            raise

    def _full(self, reason: str) -> CheckpointError:
        step, needed = self._saving
        kept = "no step was saved yet" if self.latest() is None else f"step {self.latest()} is intact"
        return CheckpointError(
            f"{self.directory}: no room for the checkpoint of step {step} ({reason}): it needs {needed:,} "
            f"bytes, {self._free():,} are free; make room, or use another --run-dir; {kept}."
        )

    def _read[T](self, step: int, read: Callable[[str], T]) -> T:
        """`read` of the step's directory; says in a line that it is missing or damaged."""
        path = self._path(step)
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; choose from: {there}.")
        try:
            return read(str(path))
        except Exception as error:
            earlier = max((s for s in self.steps() if s < step), default=None)
            cure = "use another --run-dir" if earlier is None else f"move it away to go on from step {earlier}"
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise CheckpointError(f"{path}: cannot be read ({reason}): {cure}.") from error

    def _compare(self, step: int, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name in [*wanted, *found]:
            there, here = _kind(found.get(name)), _kind(wanted.get(name))
            if there != here:
                raise CheckpointError(
                    f"{self._path(step)}: {name} is {there} in this checkpoint and {here} in this config: "
                    "use another --run-dir, or the config that the checkpoint was made with."
                )


def digest(tree: Any) -> str:
    """SHA-256 in hex of every leaf's path, dtype, shape and bytes, in the order of the paths.

    Equal for equal bits, however the leaves are sharded; each must be addressable from this process.
    """
    sha = hashlib.sha256()
    for name, leaf in sorted(_by_path(tree).items()):
        values = np.asarray(leaf)
        sha.update(f"{name} {_kind(values)}\n".encode())
        sha.update(values.tobytes())
    return sha.hexdigest()


def _by_path(tree: Any) -> dict[str, Any]:
    """{"params/blocks/scale": leaf}, in the tree's own order."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves have one path"
    return named


def _kind(leaf: Any) -> str:
    """float32[3,4] for an array or what stands for one; "absent" for None."""
    if leaf is None:
        return "absent"
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _no_room(error: BaseException) -> str | None:
    """The system's words if a full disk, a quota or a file size limit ended a write; else None."""
    # tensorstore raises no OSError: the system's number is in its message.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(number[1]) if number else getattr(error, "errno", None)
    return os.strerror(code) if code in NO_ROOM else None


def _stored(path: str) -> ocp.CheckpointMetadata:
    stored = ocp.metadata(path, "state")
    if stored.metadata is None:  # Orbax logs the reason, and only logs it
        raise ValueError("its metadata is damaged")
    return stored


@functools.cache
def _hush_orbax() -> None:
    """Drops what Orbax prints of an error that it also raises: pages of it, where we say one line."""

    def not_of_orbax(record: logging.LogRecord) -> bool:
        raised = str(record.exc_info[1]) if record.exc_info else ""
        return f"{os.sep}orbax{os.sep}" not in record.pathname and "tensorstore" not in raised

    def unraisable(args: Any) -> None:
        if "Event loop is closed" not in str(args.exc_value):
            before(args)

    # A read that fails closes the event loop under the others: some complain, some are never begun.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(not_of_orbax)
    before, sys.unraisablehook = sys.unraisablehook, unraisable
