"""Shared fixtures: several processes of one run, and a full disk for one process."""

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
OURS = ("JAX_", "XLA_", "NPROC", "SLURM_", "OMPI_")  # what these tests, or a cluster they run on, may have set


@pytest.fixture
def start() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """`start(script, *arguments, count=2)`: Python processes of one run on one CPU device each, killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, *arguments: object, count: int = 1, **environment: str) -> list[subprocess.Popen[str]]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        common = inherited | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
        address = f"127.0.0.1:{_free_port()}"
        several = [
            {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
            for number in range(count)
        ]
        group = [
            subprocess.Popen(
                [sys.executable, "-c", script, *map(str, arguments)],
                cwd=ROOT,
                env=common | (own if count > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for own in several
        ]
        started.extend(group)
        return group

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def finish() -> Callable[[subprocess.Popen[str], int], tuple[str, str]]:
    """`finish(process, code)`: waits until it ends with this code; what it then has said on stdout, stderr."""

    def wait(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
        said = process.communicate(timeout=120)
        assert process.returncode == code, "\n".join(said)
        return said

    return wait


@pytest.fixture
def files_at_most():
    """`with files_at_most(1000):` no file of this process grows beyond 1000 bytes."""

    @contextlib.contextmanager
    def limit(num_bytes: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
