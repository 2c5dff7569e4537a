"""What Orbax says when it fails, in a line where it says pages."""

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
    """The system's words if a full disk, a quota, a file size limit or a lack of rights ended a write; else None."""
    # tensorstore raises no OSError: the system's number is in its message.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(number[1]) if number else getattr(error, "errno", None)
    return os.strerror(code) if code in NO_ROOM + NOT_ALLOWED else None


def first_line(error: BaseException) -> str:
    """The reason of an error that was raised from another."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@functools.cache
def hush_orbax() -> None:
    """Drops what Orbax prints of an error that it also raises."""

    def not_of_orbax(record: logging.LogRecord) -> bool:
        raised = str(record.exc_info[1]) if record.exc_info else ""
        return f"{os.sep}orbax{os.sep}" not in record.pathname and "tensorstore" not in raised

    def unraisable(args: Any) -> None:
        code = getattr(args.object, "cr_code", None)
        of_orbax = code is not None and f"{os.sep}orbax{os.sep}" in code.co_filename
        if not of_orbax and "Event loop is closed" not in str(args.exc_value):
            before(args)

    # A read that fails closes the event loop under the others: some complain, some are never begun.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(not_of_orbax)
    before, sys.unraisablehook = sys.unraisablehook, unraisable
