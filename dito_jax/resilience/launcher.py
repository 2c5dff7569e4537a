"""Runs the command of one worker on its host: relays output, passes on signals, and stops it if the supervisor ends.

    python -I launcher.py COMMAND...

The supervisor starts this script on its own host or, over ssh, on another one, and keeps the standard input open. A
signal to an ssh client does not reach the remote command, so requests are lines of the standard input: `signal NUMBER`
(SIGKILL goes to the whole process group) and `state`. Reports are lines of the standard output that begin with MARK:
`state S`, the letter of /proc/PID/stat, and `exit CODE`, the return code as in subprocess.

If the standard input ends, the supervisor or the connection is lost: the command gets SIGTERM, so a training process
saves and exits with 75, and SIGKILL after ORPHAN_SECONDS. The first line has to be HELLO; a remote shell that passes no
standard input on would otherwise stop every command. Only the standard library is imported.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path


MARK = "\x1edito "
HELLO = "hello"
ORPHAN_SECONDS = 600.0
LAST_OUTPUT_SECONDS = 2.0  # a grandchild may keep the pipe open after the end of the command
PDEATHSIG = 1  # prctl option of Linux: a signal to the child when its parent ends


class Launcher:
    """The command and its output."""

    def __init__(self, command: list[str]):
        self._writing, self._at_line_start = threading.Lock(), True
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
        self._relay = threading.Thread(target=self._relay_output, daemon=True)

    def run(self) -> int:
        """Runs until the command has ended; returns its return code as in subprocess."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, lambda n, _: self._signal(signal.SIGTERM if n == signal.SIGHUP else n))
        self._relay.start()
        threading.Thread(target=self._serve, daemon=True).start()
        code = self._child.wait()
        self._relay.join(LAST_OUTPUT_SECONDS)
        self._report(f"exit {code}")
        return code

    def _serve(self) -> None:
        """Handles requests until the standard input ends, then stops the command."""
        if sys.stdin.readline().strip() != HELLO:
            self._write(b"dito: the remote shell passes no standard input, so no signal of the supervisor arrives.\n")
            return
        for line in iter(sys.stdin.readline, ""):
            request, _, value = line.strip().partition(" ")
            if request == "signal":
                self._signal(int(value))
            elif request == "state":
                self._report(f"state {self._state()}")
        self._signal(signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._child.pid, number)
            else:
                os.kill(self._child.pid, number)

    def _state(self) -> str:
        """The letter of the command's state in /proc; "?" where there is none."""
        try:
            return Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "?"

    def _relay_output(self) -> None:
        # Without the relay a command whose supervisor has ended would fail at its next line of output, before its save.
        assert self._child.stdout is not None
        while content := os.read(self._child.stdout.fileno(), 1 << 16):
            self._write(content)

    def _report(self, text: str) -> None:
        with self._writing:
            self._put(("" if self._at_line_start else "\n").encode() + f"{MARK}{text}\n".encode())

    def _write(self, content: bytes) -> None:
        with self._writing:
            self._put(content)

    def _put(self, content: bytes) -> None:
        self._at_line_start = content.endswith(b"\n")
        with contextlib.suppress(OSError):  # nobody reads any more
            while content:
                content = content[os.write(1, content) :]


def _end_with_parent() -> None:
    """In the child: SIGTERM if this script is killed (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)


def main() -> None:
    try:
        code = Launcher(sys.argv[1:]).run()
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error.strerror}.")
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)  # not waiting for the threads


if __name__ == "__main__":
    main()
