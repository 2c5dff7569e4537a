"""Python processes that start with the packages already imported, which saves the five seconds of each cold start.

A server process imports the packages once and forks for every program. A program is a process of its own, with its own
arguments, environment, working directory and output; its signals and exit code are real. What the packages do while
they are imported is not repeated: tests of that start a cold process.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path


ROOT = Path(__file__).parent.parent
IMPORTED = ("train", "dito_jax.cli.main", "dito_jax.cli.train", "sklearn.datasets", "matplotlib.pyplot")
READ_AT_IMPORT = ("JAX_", "XLA_", "NPROC")  # the server has none of these: programs are to run as a user's
QUICK_COMPILES = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # but for this, as in the tests themselves


class Process:
    """Runs `python ARGUMENTS`, as far as these tests use subprocess.Popen."""

    def __init__(self, arguments: Sequence[object], *, env: Mapping[str, str], separate_stderr: bool = False):
        self._out = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._err = tempfile.NamedTemporaryFile() if separate_stderr else None  # noqa: SIM115
        files = self._out.name, (self._err or self._out).name
        target = (list(map(str, arguments)), str(ROOT), dict(env) | QUICK_COMPILES, files)
        self._process = _server().Process(target=_run, args=target)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = lambda self: self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; (stdout, stderr)."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0, Path(self._out.name).read_bytes())
        return tuple(Path(file.name).read_text() if file else "" for file in (self._out, self._err))


def run(arguments: Sequence[object], *, env: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """The same as subprocess.run with captured output."""
    process = Process(arguments, env=env, separate_stderr=True)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(list(arguments), process.returncode, out, err)


def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    before = dict(os.environ)
    path = os.pathsep.join([str(ROOT), *([before["PYTHONPATH"]] if "PYTHONPATH" in before else [])])
    kept = {name: value for name, value in before.items() if not name.startswith(READ_AT_IMPORT)}
    try:
        _become(kept | QUICK_COMPILES | {"PYTHONPATH": path})
        multiprocessing.forkserver.ensure_running()
    finally:
        _become(before)
    return context


def _become(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _run(arguments: list[str], folder: str, environment: dict[str, str], files: tuple[str, str]) -> None:
    """In the forked process: becomes `python ARGUMENTS`."""
    os.chdir(folder)
    _become(environment)
    for number, name in enumerate(files, start=1):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
