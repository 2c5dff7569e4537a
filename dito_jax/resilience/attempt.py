"""One start of all worker processes of a run, on this or on other hosts: environment, output, signals, exit codes."""

import contextlib
import dataclasses
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from dito_jax.errors import UserError
from dito_jax.resilience.launcher import HELLO, MARK
from dito_jax.resilience.workers import Worker, launch_command


LOST_CONNECTION = 255  # exit code of ssh without one of the remote command


@dataclasses.dataclass(frozen=True)
class Limits:
    """Time limits for the end of processes, in seconds."""

    grace: float  # from the failure of one process until SIGKILL to the others
    stop: float  # from a stop signal until SIGKILL
    kill: float = 30.0  # from SIGKILL until a process that is not gone is given up


@dataclasses.dataclass(frozen=True)
class End:
    """How a process ended."""

    process: int
    code: int  # return code as in subprocess: -9 for SIGKILL
    killed: bool  # killed by the supervisor because another process had failed, or too late after a stop signal
    state: str | None = None  # letter of its state in /proc when another one had failed; None: no answer, or not asked
    lost: bool = False  # the connection to its host was lost
    stuck: bool = False  # it did not end after SIGKILL, on a host that answers

    def words(self) -> str:
        """The exit code or the name of the signal, for messages."""
        if self.lost:
            return "loss of the connection to its host (exit code 255)"
        return f"exit code {self.code}" if self.code >= 0 else signal.Signals(-self.code).name


class Attempt:
    """Runs `command` on every worker until all processes have ended, with the environment for jax.distributed.

    `on_line` is called with each line of output, `on_failure` when the first process has failed. The others are then
    killed after `limits.grace` seconds.
    """

    def __init__(
        self,
        command: Sequence[str],
        workers: Sequence[Worker],
        number: int,
        *,
        remote_shell: str,
        on_line: Callable[[str], None],
        limits: Limits,
        on_failure: Callable[[], None] = lambda: None,
    ):
        self._on_line, self._on_failure, self._limits = on_line, on_failure, limits
        self._kill_at = float("inf")  # time.monotonic()
        address = _address(workers)
        self._processes: list[_Process] = []
        for index, worker in enumerate(workers):
            environment = _environment(worker, index, len(workers), address, number)
            prefix = f"[process {index}] " if len(workers) > 1 else ""
            process = _Process(_start(command, worker, environment, remote_shell), worker)
            self._processes.append(process)
            process.read(lambda line, prefix=prefix: self._on_line(prefix + line))

    def signal(self, number: int) -> None:
        """Sends a stop signal to every process that still runs."""
        self._kill_at = min(self._kill_at, time.monotonic() + self._limits.stop)
        for process in self._processes:
            process.ask(f"signal {int(number)}")

    def wait(self) -> list[End]:
        """Waits until all processes have ended, or do not end after SIGKILL; returns the ends in their order."""
        ends: dict[int, End] = {}
        failed, killed_at = False, float("inf")
        while len(ends) < len(self._processes):
            if killed_at == float("inf") and time.monotonic() > self._kill_at:
                killed_at = time.monotonic()
                self._request("signal 9", ends)
            stuck = time.monotonic() > killed_at + self._limits.kill
            for index, process in enumerate(self._processes):
                if index not in ends and (end := process.end(index, killed_at != float("inf"), stuck)) is not None:
                    ends[index] = end
            if not failed and any(end.code for end in ends.values()):
                failed = True
                self._kill_at = min(self._kill_at, time.monotonic() + self._limits.grace)
                self._request("state", ends)
                self._on_failure()
            time.sleep(0.02)
        return list(ends.values())

    def _request(self, line: str, ended: dict[int, End]) -> None:
        for index, process in enumerate(self._processes):
            if index not in ended:
                process.ask(line)


class _Process:
    """The launcher of one worker, or the ssh client that runs it on another host."""

    def __init__(self, popen: subprocess.Popen, worker: Worker):
        self._popen, self._worker = popen, worker
        self._state: str | None = None
        self._code: int | None = None
        assert popen.stdin is not None
        os.set_blocking(popen.stdin.fileno(), False)
        self.ask(HELLO)

    def ask(self, line: str) -> None:
        """Sends a line to the launcher; a signal handler may call it."""
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, or reads nothing
            os.write(self._popen.stdin.fileno(), f"{line}\n".encode())

    def read(self, on_line: Callable[[str], None]) -> None:
        """Starts the thread that reads the output."""
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as lines:
            for line in lines:
                said, mark, report = line.rstrip("\n").partition(MARK)
                if said or not mark:
                    on_line(said)
                kind, _, value = report.partition(" ")
                if kind == "state":
                    self._state = value
                elif kind == "exit":
                    self._code = int(value)

    def end(self, index: int, killed: bool, stuck: bool) -> End | None:
        """How it ended; None if it runs. If it is `stuck`, it is left alone."""
        ended = self._popen.poll()
        if ended is None and not stuck:
            return None
        if ended is None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._popen.pid, signal.SIGKILL)
                self._popen.wait(timeout=5)
        self._reader.join(timeout=5)  # a grandchild may hold the pipe open
        with contextlib.suppress(OSError):
            self._popen.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        if ended is None:
            # A host that does not answer may be gone with its process; one that answers still has the process.
            there = self._worker.host is None or self._state is not None
            return End(index, -signal.SIGKILL, killed=True, state=self._state, stuck=there)
        lost = self._code is None and self._worker.host is not None and ended == LOST_CONNECTION
        code = ended if self._code is None else self._code
        return End(index, code, killed=killed, state=self._state, lost=lost)


def _start(command: Sequence[str], worker: Worker, added: dict[str, str], remote_shell: str) -> subprocess.Popen:
    environment = os.environ | added
    launched = launch_command(command, worker, environment, remote_shell)
    # Own session: Ctrl-C in the terminal reaches only the supervisor, which forwards it once.
    try:
        return subprocess.Popen(
            launched, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{launched[0]}: {error.strerror}; wanted a program: check --remote-shell.") from error


def _environment(worker: Worker, index: int, count: int, address: str, number: int) -> dict[str, str]:
    ours = {"DITO_WORKER": str(worker.slot), "DITO_ATTEMPT": str(number), "PYTHONUNBUFFERED": "1"}
    if count > 1:
        ours |= {
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index),
        }  # fmt: skip
    return ours


def _address(workers: Sequence[Worker]) -> str:
    """host:port of process 0 for jax.distributed; a free port if process 0 runs on this host, else a random one."""
    if workers[0].host is not None:
        return f"{workers[0].host.rpartition('@')[2]}:{random.randrange(20_000, 60_000)}"
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return f"{socket.gethostname() if any(worker.host for worker in workers) else '127.0.0.1'}:{port}"
