"""The workers of a supervised run: hosts, the command for a host, and the environment that is passed to it."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dito_jax.errors import UserError


LAUNCHER = Path(__file__).with_name("launcher.py")
# What a process on another host gets of the supervisor's environment. The values are in its command line, which other
# users of that host can read, so no credentials: of TF_* and of every other prefix only what is named here.
FORWARDED_PREFIXES = ("DITO_", "JAX_", "XLA_", "NCCL_", "CUDA_")
FORWARDED_NAMES = (
    "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONUNBUFFERED", "TF_CPP_MIN_LOG_LEVEL", "TF_GPU_ALLOCATOR",
)  # fmt: skip
CREDENTIALS = ("KEY", "TOKEN", "PASSWORD", "CREDENTIAL")  # parts of names that are not forwarded under any prefix


@dataclasses.dataclass(frozen=True)
class Worker:
    """A slot for one process of the run, on a host."""

    slot: int
    host: str | None = None  # None: this host

    def words(self) -> str:
        """The worker's number and host, for messages."""
        return f"worker {self.slot}" + (f" on {self.host}" if self.host else "")


def make_workers(processes: int, hosts: Sequence[str]) -> list[Worker]:
    """One worker for each of `processes` on this host, or one on each of `hosts`; a host may be named repeatedly.

    Raises:
      UserError: both are given, or less than one process, or a host name that ssh would take for an option.
    """
    if hosts and processes != 1:
        raise UserError("supervise: give --processes for this machine, or --hosts, not both.")
    if processes < 1:
        raise UserError(f"supervise: --processes {processes}: wanted at least 1.")
    for host in hosts:
        user, _, name = host.rpartition("@")
        if not name or host.startswith("-") or name.startswith("-") or not host.isprintable() or " " in host:
            raise UserError(f"supervise: --hosts {host!r}: wanted a host name, or user@host, as ssh takes it.")
    return [Worker(slot, host) for slot, host in enumerate(hosts or [None] * processes)]


def launch_command(
    command: Sequence[str], worker: Worker, environment: Mapping[str, str], remote_shell: str
) -> list[str]:
    """The command that runs `command` by launcher.py for a worker; `environment` is that of a process on this host."""
    launched = [sys.executable, "-I", str(LAUNCHER), *command]
    if worker.host is None:
        return launched
    assignments = [f"{name}={value}" for name, value in sorted(forwarded(environment).items())]
    there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *assignments, *launched])}"
    return [*shlex.split(remote_shell), worker.host, there]


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that processes on other hosts get."""
    return {
        name: value
        for name, value in environment.items()
        if name in FORWARDED_NAMES
        or name.startswith(FORWARDED_PREFIXES)
        and not any(part in name for part in CREDENTIALS)
    }
