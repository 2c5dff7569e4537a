"""Orbax errors: one-line messages for full or read-only disks, and a filter for duplicated log output."""

import errno
import functools
import logging
import os
import re
import sys
import warnings
from typing import Any


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def refusal(error: BaseException) -> str | None:
    """The system's error text if a full disk, a quota, a size limit or permissions caused `error`; else None."""
    code = error_code(error)
    return os.strerror(code) if code is not None and code in NO_ROOM + NOT_ALLOWED else None


def error_code(error: BaseException) -> int | None:
    """The errno of an error of the system, also of one that tensorstore reports; else None."""
    # tensorstore does not raise OSError: the errno is in its message.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(number[1]) if number else getattr(error, "errno", None)
    return code if isinstance(code, int) else None


def first_line(error: BaseException) -> str:
    """The first line of the cause of an error, or of the error itself."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@functools.cache
def hush_orbax() -> None:
    """Suppresses log output and warnings of Orbax about errors that it also raises."""

    def not_of_orbax(record: logging.LogRecord) -> bool:
        raised = str(record.exc_info[1]) if record.exc_info else ""
        # A read that a stop signal ended leaves its tasks behind.
        left = record.name == "asyncio" and f"{os.sep}orbax{os.sep}" in record.getMessage()
        return not left and f"{os.sep}orbax{os.sep}" not in record.pathname and "tensorstore" not in raised

    def unraisable(args: Any) -> None:
        code = getattr(args.object, "cr_code", None)
        of_orbax = code is not None and f"{os.sep}orbax{os.sep}" in code.co_filename
        of_loop = any(words in str(args.exc_value) for words in ("Event loop is closed", "EventLoop' object has no"))
        if not (of_orbax or of_loop):
            before(args)

    # A failed read closes the event loop of the other reads: some of them warn, some are never started.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(not_of_orbax)
    before, sys.unraisablehook = sys.unraisablehook, unraisable
