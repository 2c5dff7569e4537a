"""The directory of one run: what its files are called, one trainer at a time, and no file half-written."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dito_jax.errors import UserError


class RunDirectory:
    """runs/<name>, made by the first write. Reading it needs no lock."""

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
        self.heartbeats = self.path / "heartbeats"  # one file a process, named by its number

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keeps every other process from training here, until the block or the process ends, however it ends.

        Raises:
          UserError: another process holds it; the line names its pid and host.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as file:
            # A POSIX record lock, unlike flock, is not inherited: a forked data worker that outlives a killed
            # trainer does not keep it.
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                raise UserError(
                    f"{self.path}: {file.read() or 'another process'} is training in it: "
                    "wait for it, stop it, or use another --run-dir."
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def write_text(self, name: str, text: str) -> Path:
        """Writes a file of the run, all of it or none: a reader sees the old one or the new one.

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
            finally:
                unfinished.unlink(missing_ok=True)
        return path

    def append(self, path: Path, text: str) -> None:
        """Adds whole lines to the end of a file, on the disk when it returns.

        A line that a killed process left half-written is ended first, so that it spoils no other.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def write_json(self, name: str, value: Any) -> Path:
        """`write_text` of `value` as JSON that a person can read."""
        return self.write_text(name, json.dumps(value, indent=2) + "\n")


class FollowedDirectory(RunDirectory):
    """The same directory in a process that leaves the writing to another."""

    writes = False

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing: the process that writes holds it."""
        yield

    def write_text(self, name: str, text: str) -> Path:
        """Nothing but the path."""
        del text
        return self.path / name

    def append(self, path: Path, text: str) -> None:
        """Nothing."""


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a file of JSON objects; those that a killed process left half-written are left out."""
    if not path.exists():
        return []
    rows = []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a full disk, met while writing `path`, into a UserError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"{path}: {error.strerror}: make room, then run the same command again.") from error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to; it is renamed to `path` once all is written, and removed after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
