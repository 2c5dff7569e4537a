"""One start of all worker processes of a run, on this or on other hosts: environment, output and exit codes."""

import contextlib
import dataclasses
import os
import random
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from dito_jax.errors import UserError


PASSED_ON = ("DITO_", "JAX_", "XLA_", "NCCL_", "CUDA_", "TF_")  # prefixes of variables passed to workers on other hosts


@dataclasses.dataclass(frozen=True)
class Worker:
    """A slot for one process of the run, on a host."""

    slot: int
    host: str | None = None  # None: this host


@dataclasses.dataclass(frozen=True)
class End:
    """How a process ended."""

    process: int
    code: int  # return code as in subprocess: -9 for SIGKILL
    killed: bool  # killed by the supervisor because another process had failed

    def words(self) -> str:
        """The exit code or the name of the signal, for messages."""
        return f"exit code {self.code}" if self.code >= 0 else signal.Signals(-self.code).name


class Attempt:
    """Runs `command` on every worker until all processes have ended, with the environment for jax.distributed.

    `on_line` is called with each line of output. When one process fails, the others are killed after `grace` seconds.
    """

    def __init__(
        self,
        command: Sequence[str],
        workers: Sequence[Worker],
        number: int,
        *,
        remote_shell: str,
        on_line: Callable[[str], None],
        grace: float,
    ):
        self._on_line, self._grace = on_line, grace
        address = _address(workers)
        self._processes = [
            _start(command, worker, _environment(worker, index, len(workers), address, number), remote_shell)
            for index, worker in enumerate(workers)
        ]
        self._readers = [
            threading.Thread(target=self._read, args=(index, process), daemon=True)
            for index, process in enumerate(self._processes)
        ]
        for reader in self._readers:
            reader.start()

    def signal(self, number: int) -> None:
        """Sends a signal to every process that still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> list[End]:
        """Waits until all processes have ended; returns them in the order in which they ended."""
        ends: list[End] = []
        deadline = float("inf")
        while len(ends) < len(self._processes):
            late = time.monotonic() > deadline
            for index, process in enumerate(self._processes):
                if index in {end.process for end in ends}:
                    continue
                if late:
                    _kill(process)
                if (code := process.poll()) is not None:
                    ends.append(End(index, code, killed=late))
                    if code and deadline == float("inf"):
                        deadline = time.monotonic() + self._grace
            time.sleep(0.02)
        for reader in self._readers:
            reader.join(timeout=5)  # a grandchild may hold the pipe open
        return ends

    def _read(self, index: int, process: subprocess.Popen) -> None:
        prefix = f"[process {index}] " if len(self._processes) > 1 else ""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._on_line(prefix + line.rstrip("\n"))


def _start(command: Sequence[str], worker: Worker, added: dict[str, str], remote_shell: str) -> subprocess.Popen:
    environment = os.environ | added
    if worker.host is not None:
        passed = {name: value for name, value in environment.items() if name.startswith(PASSED_ON)}
        assignments = [f"{name}={value}" for name, value in sorted(passed.items())]
        there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *assignments, *command])}"
        command = [*shlex.split(remote_shell), worker.host, there]
    # Own session: Ctrl-C in the terminal reaches only the supervisor, which forwards it once.
    try:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{command[0]}: {error.strerror}; wanted a program: check --remote-shell.") from error


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


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
