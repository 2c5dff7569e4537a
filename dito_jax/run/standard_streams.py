"""Standard output and error of a command: closed, or with a reader that goes away, they do not end it.

A run may train for days after `| head` has ended, after the terminal was closed, or after `2>&-`. What it writes from
then on is dropped; events.jsonl and metrics.jsonl have it.
"""

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO


READER_IS_GONE = (errno.EPIPE, errno.EIO)  # EIO: the terminal was closed
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LenientFile(io.FileIO):
    """A file whose descriptor becomes that of /dev/null once nobody reads what is written to it."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in READER_IS_GONE:
                _to_null(self.fileno())  # for what C code writes, too
            elif error.errno not in NO_ROOM or self.fileno() != 2:  # a result that cannot be written is an error
                raise
            return memoryview(data).nbytes


def make_lenient() -> None:
    """Replaces sys.stdout and sys.stderr, unless they were replaced already; opens /dev/null for closed ones."""
    for number in (0, 1, 2):
        # Before any other file is opened: it would have the number of the closed one, and get what is printed.
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        _to_null(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, lenient(number, stream))


def lenient(number: int, before: TextIO | None) -> TextIO:
    """A text stream for a descriptor, with the encoding of `before`; names of files in any encoding can be printed."""
    if before is not None:
        with contextlib.suppress(OSError):
            before.flush()
    at_once = number == 2 or getattr(before, "write_through", False)
    buffered = io.BufferedWriter(LenientFile(number, "w", closefd=False))
    return io.TextIOWrapper(
        buffered, encoding=getattr(before, "encoding", None) or "utf-8", errors="backslashreplace",
        line_buffering=at_once or os.isatty(number), write_through=at_once,
    )  # fmt: skip


def _to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
