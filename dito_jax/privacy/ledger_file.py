"""The file of a privacy ledger: an exclusive lock, complete lines on disk, and the schema of the entries.

Guarantees
  - One `Ledger` at a time, of any thread of any process, has the file. The lock belongs to the open file (Linux OFD
    lock): it excludes other threads too, and it is not lost when the process closes the file elsewhere. It also
    excludes the POSIX locks of earlier versions of this program.
  - An appended line is on disk completely, or the file is as before and the error names it.
  - An entry with an unknown schema version, kind or field is an error: what it has spent is not known. Entries without
    a schema version were written by dito_jax 0.2 or earlier.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dito_jax.errors import UserError
from dito_jax.privacy.accounting import Release
from dito_jax.privacy.budget import Budget, Plan
from dito_jax.telemetry.run_directory import explained
from dito_jax.version import installed


SCHEMA = 1
FIELDS = {"schema", "number", "time", "kind", "run", "payload", "previous", "hash"}
KINDS = ("budget", "start", "step", "torn")
_in_process = threading.Lock()  # for systems without OFD locks


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, which is created if it is missing, for reading and appending; other openers wait.

    Raises:
      UserError: the disk is full.
    """
    with _in_process:
        with explained(path):
            if new := not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab+", buffering=0)
        with file:
            if new:
                _sync_directory(path.parent)
            _lock(file, fcntl.F_WRLCK)
            try:
                yield file
            finally:
                _lock(file, fcntl.F_UNLCK)  # a forked process may still have the file open


def append_line(file: BinaryIO, path: Path, line: bytes) -> None:
    """Appends a line; it is on disk when the function returns.

    Raises:
      UserError: the disk is full; the file is as before.
    """
    before = os.fstat(file.fileno()).st_size
    with explained(path):
        try:
            rest = line
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def check_schema(entry: Mapping[str, Any]) -> None:
    """Raises UserError if the schema version of an entry is not known."""
    if type(version := entry.get("schema", SCHEMA)) is not int or version != SCHEMA:
        raise UserError(f"it has schema version {version}, known is {SCHEMA}; {_remedy()}")


def content(entry: Mapping[str, Any]) -> Budget | Plan | Release | str:
    """What an entry says: Budget, Plan of a start, Release of a step, or text of an incomplete line.

    Raises:
      UserError: the kind or a field of the entry is not known, or a value is not valid.
    """
    kind, payload = entry.get("kind"), entry.get("payload")
    if kind not in KINDS:
        raise UserError(f"it is of kind {kind!r}, known are {', '.join(KINDS)}; {_remedy()}")
    if unknown := sorted(set(entry) - FIELDS):
        raise UserError(f"it has the field {unknown[0]!r}, known are {', '.join(sorted(FIELDS))}; {_remedy()}")
    try:
        if not isinstance(entry["run"], str) or not isinstance(payload, dict):
            raise TypeError("wanted a text as run and an object as payload")
        if kind == "budget":
            budget = _made(Budget, payload)
            if not (budget.epsilon > 0 and 0 < budget.delta < 1):
                raise ValueError(f"epsilon {budget.epsilon}, delta {budget.delta}")
            return budget
        if kind == "start":  # its further fields are notes
            return Plan(int(payload["restart"]), _made(Release, payload["release"]), int(payload["steps"]))
        if kind == "step":
            return _made(Release, _only(payload, "restart", "step", "release")["release"])
        return str(_only(payload, "text")["text"])
    except (TypeError, KeyError, ValueError) as error:
        reason = error if isinstance(error, UserError) else f"a field of it is missing or has no valid value ({error})."
        raise UserError(f"it is a {kind} with an unknown or invalid field: {reason} {_remedy()}") from error


def _made[T](kind: type[T], values: Any) -> T:
    return kind(**_only(values, *(field.name for field in dataclasses.fields(kind))))  # pyright: ignore


def _only(values: Any, *known: str) -> dict[str, Any]:
    if unknown := sorted(set(dict(values)) - set(known)):
        raise UserError(f"{unknown[0]!r}, known are {', '.join(known)};")
    return values


def _remedy() -> str:
    return (
        f"the spent privacy is unknown to dito_jax {installed()}: use the version that wrote the file, or restore the "
        "file from a copy."
    )


def _lock(file: BinaryIO, kind: int) -> None:
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW, struct.pack("@hhqqi", kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno != errno.EINVAL:  # the system has no OFD locks
            raise
        fcntl.lockf(file, fcntl.LOCK_EX if kind == fcntl.F_WRLCK else fcntl.LOCK_UN)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
