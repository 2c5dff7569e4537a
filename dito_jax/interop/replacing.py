"""Writes a directory as a whole: a reader, or a kill at any moment, finds the old content or the new one."""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dito_jax.telemetry.run_directory import sync_directory, sync_tree


AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux: <fcntl.h>, <linux/fs.h>
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # what a kernel or a file system without it answers


@contextlib.contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """Yields a new directory to write to; it takes the place of `directory` at the end, on disk (fsync).

    After an error `directory` is as it was. On a file system that cannot exchange two names there is a moment in which
    a kill leaves the old content under the name `.NAME.PID.old` and the new one under `.NAME.PID.partial`.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left in directory.parent.glob(f".{directory.name}.*.partial"):
        if not _runs(left.suffixes[-2][1:]):
            shutil.rmtree(left)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        if directory.exists():
            _exchange(partial, directory)
        else:
            partial.rename(directory)
        sync_directory(directory.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # the old content, or an unfinished new one


def _exchange(one: Path, other: Path) -> None:
    """Exchanges the names of two directories in one step, where the system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if rename is not None:
        if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
    if code not in NO_EXCHANGE:
        raise OSError(code, os.strerror(code), str(other))
    other.rename(aside := one.with_suffix(".old"))
    one.rename(other)
    aside.rename(one)


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
