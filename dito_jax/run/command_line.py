"""What every command shares: exit codes, one line for the user's mistakes, and where compiled programs are kept.

It imports no JAX, so that help and mistakes are answered at once.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dito_jax.errors import CRASHED, INTERRUPTED, PREEMPTED, USER_MISTAKE, Preempted, UserError
from dito_jax.run.standard_streams import make_lenient


# Errors of the file system that a path which the user gave, or another program, causes.
OF_PATHS = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES,
    errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENXIO, errno.EBUSY,
)  # fmt: skip
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def run[Arguments](
    parse: Callable[[], Arguments],
    execute: Callable[[Arguments], None],
    *,
    computes: Callable[[Arguments], bool] = lambda _: True,
) -> None:
    """Runs a command; a UserError, or an error of the file system, ends it with one line and exit code 2.

    A mistake in the arguments is reported before anything is printed about devices. A command that does not compute
    prints nothing about devices.
    """
    make_lenient()
    try:
        arguments = parse()
        if computes(arguments):
            from kernels_pallas import backend

            backend.settle_platform()
        execute(arguments)
    except UserError as error:
        print(f"{program()}: {error}", file=sys.stderr)
        _end(USER_MISTAKE)
    except Preempted as stop:
        print(f"{program()}: {stop}", file=sys.stderr)
        _end(PREEMPTED)
    except KeyboardInterrupt:
        _end(INTERRUPTED)
    except Exception as error:
        if (line := _of_file_system(error)) is not None:
            print(f"{program()}: {line}", file=sys.stderr)
            _end(USER_MISTAKE)
        if not _several_processes():
            raise
        traceback.print_exc()
        _end(CRASHED)


def _of_file_system(error: Exception) -> str | None:
    """The line for an error of the file system; None for all others."""
    if not isinstance(error, OSError):
        return None
    if error.errno in NO_ROOM or error.errno in (errno.EACCES, errno.EROFS):
        where = f"{error.filename}: " if error.filename is not None else ""  # a write names no file
        return f"{where}{error.strerror}."
    if error.errno in OF_PATHS and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}: check this path, then run the same command again."
    return None


def program() -> str:
    """The name of the command: "train.py" or "dito"."""
    name = Path(sys.argv[0]).name
    return "dito" if name == "__main__.py" else name


def say(text: str) -> None:
    """A line on stderr, by one process of several."""
    distributed = _distributed()
    if distributed is None or distributed.index() == 0:
        print(text, file=sys.stderr)


def cache_directory() -> str:
    """Where compiled programs are kept between runs: $DITO_CACHE, or ~/.cache/dito_jax."""
    return os.environ.get("DITO_CACHE") or str(Path.home() / ".cache" / "dito_jax")


def _end(code: int) -> NoReturn:
    """Ends the process; of several, without waiting for those that wait for this one."""
    if _several_processes():
        _distributed().leave(code)
    sys.exit(code)


def _several_processes() -> bool:
    distributed = _distributed()
    return distributed is not None and distributed.count() > 1


def _distributed() -> Any:
    """dito_jax.distributed where it is imported, else None: it imports JAX, and the process is then alone."""
    return sys.modules.get("dito_jax.distributed")
