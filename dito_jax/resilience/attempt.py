"""One start of all processes of a run, here or on other machines: their environment, their output, their end."""

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


PASSED_ON = ("DITO_", "JAX_", "XLA_", "NCCL_", "CUDA_", "TF_")  # variables that a process on another machine gets


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one process may run."""

    slot: int
    host: str | None = None  # None: this machine


@dataclasses.dataclass(frozen=True)
class End:
    """How a process ended."""

    process: int
    code: int  # as subprocess has it: -9 for SIGKILL
    killed: bool  # by us, as another had ended

    def words(self) -> str:
        """For a person."""
        return f"exit code {self.code}" if self.code >= 0 else signal.Signals(-self.code).name


class Attempt:
    """Runs `command` in every place, with the environment by which processes find each other, until all have ended.

    `tell` gets each line of their output. When one fails, the others have `grace` seconds to end by themselves.
    """

    def __init__(
        self,
        command: Sequence[str],
        places: Sequence[Place],
        number: int,
        *,
        remote_shell: str,
        tell: Callable[[str], None],
        grace: float,
    ):
        self._tell, self._grace = tell, grace
        address = _address(places)
        self._processes = [
            _start(command, place, _environment(place, index, len(places), address, number), remote_shell)
            for index, place in enumerate(places)
        ]
        self._readers = [
            threading.Thread(target=self._read, args=(index, process), daemon=True)
            for index, process in enumerate(self._processes)
        ]
        for reader in self._readers:
            reader.start()

    def signal(self, number: int) -> None:
        """Passes a signal on to every process that is left."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> list[End]:
        """Returns when all have ended, in the order in which they did."""
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
                self._tell(prefix + line.rstrip("\n"))


def _start(command: Sequence[str], place: Place, added: dict[str, str], remote_shell: str) -> subprocess.Popen:
    environment = os.environ | added
    if place.host is not None:
        passed = {name: value for name, value in environment.items() if name.startswith(PASSED_ON)}
        assignments = [f"{name}={value}" for name, value in sorted(passed.items())]
        there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *assignments, *command])}"
        command = [*shlex.split(remote_shell), place.host, there]
    # A session of its own: the terminal's Ctrl-C reaches the supervisor alone, which passes it on once.
    try:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{command[0]}: {error.strerror}; wanted a program: look at --remote-shell.") from error


def _environment(place: Place, index: int, count: int, address: str, number: int) -> dict[str, str]:
    ours = {"DITO_PLACE": str(place.slot), "DITO_ATTEMPT": str(number), "PYTHONUNBUFFERED": "1"}
    if count > 1:
        ours |= {
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index),
        }  # fmt: skip
    return ours


def _address(places: Sequence[Place]) -> str:
    """host:port for process 0; a port that is free now, where this machine can tell."""
    if places[0].host is not None:
        return f"{places[0].host.rpartition('@')[2]}:{random.randrange(20_000, 60_000)}"
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return f"{socket.gethostname() if any(place.host for place in places) else '127.0.0.1'}:{port}"


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
