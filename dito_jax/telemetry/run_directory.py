"""The run directory: file names, a lock for the training process, and atomic writes."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dito_jax.errors import UserError


RESTART_SECONDS = 120.0  # longer than NFS keeps the locks of a host that does not answer (90 s)


class RunDirectory:
    """A run directory, runs/<name>; it is created by the first write, and reading needs no lock."""

    writes = True

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.evaluation = self.path / "eval.json"
        self.report = self.path / "report.md"
        self.events = self.path / "events.jsonl"
        self.supervision = self.path / "supervise.log"
        self.skips = self.path / "skips.json"
        self.goodput = self.path / "goodput.jsonl"
        self.heartbeats = self.path / "heartbeats"  # one file per process, named by its number

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Locks the directory for training until the block or the process ends.

        A process that `dito supervise` has started again waits RESTART_SECONDS for the lock: one of the last start may
        still be saving, or be on a host that does not answer, whose lock the file server has to take away.

        Raises:
          UserError: another process holds the lock; the message names its pid and host.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            # A POSIX record lock, unlike flock, is not inherited by a forked data worker, which may outlive a killed
            # training process.
            try:
                _lock(file)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                raise UserError(
                    f"{self.path}: {file.read() or 'another process'} is training in this directory: "
                    "wait for it, stop it, or use another --run-dir."
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def write_text(self, name: str, text: str) -> Path:
        """Writes a file of the run atomically: a reader sees the old content or the new content.

        The new content is on disk (fsync) when it returns.

        Raises:
          UserError: the disk is full; the old file is intact.
        """
        path = self.path / name
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with unfinished.open("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.replace(path)
                sync_directory(path.parent)
            finally:
                unfinished.unlink(missing_ok=True)
        return path

    def append(self, path: Path, text: str) -> None:
        """Appends complete lines to a file; they are on disk (fsync) when it returns.

        If a killed process left an incomplete last line, a newline is added first.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def write_json(self, name: str, value: Any) -> Path:
        """Writes `value` as indented JSON, atomically."""
        return self.write_text(name, json.dumps(value, indent=2) + "\n")


class FollowedDirectory(RunDirectory):
    """The run directory in a process that does not write: another process does."""

    writes = False

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Does nothing: the process that writes holds the lock."""
        yield

    def write_text(self, name: str, text: str) -> Path:
        """Returns the path and writes nothing."""
        del text
        return self.path / name

    def append(self, path: Path, text: str) -> None:
        """Does nothing."""


def _lock(file: IO[str]) -> None:
    again = int(os.environ.get("DITO_ATTEMPT", "1")) > 1
    deadline = time.monotonic() + (RESTART_SECONDS if again else 0.0)
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a line that a killed process left incomplete is skipped."""
    if not path.exists():
        return []
    rows = []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def sync_directory(path: Path) -> None:
    """Puts the names of a directory on disk (fsync), so that new, renamed and removed files survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no fsync of directories
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Puts a directory on disk (fsync): the content of all its files, their names, and its own name."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))
    sync_directory(path.parent)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raises a UserError with one line if the disk is full while `path` is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"{path}: {error.strerror}: free some space, then run the same command again.") from error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path to write to, which is renamed to `path` at the end and removed after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
