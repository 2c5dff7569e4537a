"""Failed reads of a checkpoint: requests to stop pass, passing errors are retried, only the rest can be damage.

A checkpoint is damaged if it was read whole and disagrees with its checksums, or if a part of it is missing. An error
of the file system, of the memory or of a device says nothing about the checkpoint: the read is repeated after a pause,
and if it fails each time, the user is told so. An error of Orbax of any other kind counts as damage if all files can be
read and the same read fails a second time.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from dito_jax.checkpointing.checksums import Damaged
from dito_jax.checkpointing.orbax_errors import error_code, first_line
from dito_jax.errors import UserError


PAUSES = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth attempt to read
# Numbers of the errors that the content of a directory causes: a missing file, a file in place of a directory.
OF_THE_CONTENT = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EEXIST,
)  # fmt: skip
STOPS = (KeyboardInterrupt, SystemExit)  # Preempted is a KeyboardInterrupt
PASSING_TEXTS = re.compile(r"(RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b|can't start new thread")
Tell = Callable[[str], None]  # is given one line for the user
Agree = Callable[[bool], bool]


class CheckpointError(UserError):
    """A checkpoint cannot be written or used; one line says which, why, and what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint differs from what was saved."""


class UnreadableCheckpoint(CheckpointError):
    """A checkpoint cannot be read at present; nothing is known about its content."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and all errors that it was raised from, or while handling, or that it groups."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [cause for cause in (each.__context__, each.__cause__) if cause is not None]
        waiting += each.exceptions if isinstance(each, BaseExceptionGroup) else ()


def stop_request(error: BaseException) -> BaseException | None:
    """The request to stop that `error` is, or was made of by a library; else None."""
    return next((each for each in causes(error) if isinstance(each, STOPS)), None)


def passing(error: BaseException) -> str | None:
    """What to call an error of the file system, the memory or a device; None if it can be due to the files."""
    for each in causes(error):
        code = error_code(each)
        if code is not None and code not in OF_THE_CONTENT:
            return os.strerror(code)
        if isinstance(each, MemoryError):
            return "out of memory"
        if isinstance(each, TimeoutError | jax.errors.JaxRuntimeError) or PASSING_TEXTS.match(str(each)):
            return first_line(each)
    return None


def persistently[T](path: Path, read: Callable[[], T], tell: Tell, agree: Agree = lambda fine: fine) -> T:
    """Returns `read()`, which reads the checkpoint at `path`; repeats it after a passing error, with pauses.

    `agree` makes a truth of this process one of all processes; they then repeat or give up together.

    Raises:
      Damaged: the checkpoint is damaged.
      UnreadableCheckpoint: each attempt failed, and not because of the content.
      UserError: as `read` raises it.
    """
    reason, doubted = "", False
    for pause in (*PAUSES, None):
        result, failure = _attempt(path, read, sure=doubted)
        if agree(failure is None):
            assert result is not None
            return result[0]
        for kind in (UserError, Damaged):
            if not agree(not isinstance(failure, kind)):
                raise failure if isinstance(failure, kind) else kind("it cannot be read by another process")
        reason = str(failure or "another process could not read it")
        doubted = isinstance(failure, _Doubt)
        if pause is not None:
            tell(f"{path}: cannot be read ({reason}): trying again in {pause:g} s.")
            time.sleep(pause)
    raise UnreadableCheckpoint(
        f"{path}: cannot be read ({reason}), in {len(PAUSES) + 1} attempts; it is left as it is: check the file system "
        "and the limits of this process, then run the same command again."
    )


class _Passing(Exception):
    """The message names an error that says nothing about the checkpoint."""


class _Doubt(Exception):
    """The message is that of an error that the content may have caused."""


def _attempt[T](path: Path, read: Callable[[], T], *, sure: bool) -> tuple[tuple[T] | None, Exception | None]:
    """(what was read,) or the failure; `sure` if an earlier attempt failed for no passing reason."""
    try:
        return (read(),), None
    except (UserError, Damaged) as error:
        return None, error
    except Exception as error:
        if stop := stop_request(error):
            raise stop from None
        reason = passing(error) or _unreadable_file(path)
        if reason is not None:
            return None, _Passing(reason)
        told = first_line(error)
        return None, Damaged(f"it cannot be read: {told}") if sure else _Doubt(told)


def _unreadable_file(path: Path) -> str | None:
    """Reads all files of a checkpoint; names the passing error if one cannot be read."""
    try:
        for file in sorted(path.rglob("*")) if path.is_dir() else ():
            if file.is_file():
                with file.open("rb") as opened:
                    while opened.read(1 << 24):
                        pass
    except (OSError, MemoryError) as error:
        return passing(error)
    return None
