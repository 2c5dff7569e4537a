"""The commands say what they do without a GPU, and end with one line and exit code 130 on Ctrl-C."""

import os
import runpy
import signal
import subprocess
import sys
import time

import pytest


MODULES = {
    "bench": "kernels_pallas.bench.main",
    "tune": "kernels_pallas.bench.tune",
    "inspect": "kernels_pallas.bench.inspect",
    "build": "kernels_pallas.ffi.build",
}


@pytest.mark.parametrize("command", MODULES)
def test_ctrl_c_ends_every_command_with_one_line(command, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    module = __import__(MODULES[command], fromlist=["main"])
    monkeypatch.setattr(module, "main", interrupted)
    monkeypatch.delitem(sys.modules, f"kernels_pallas.{command}.__main__", raising=False)
    if command != "bench":
        monkeypatch.delitem(sys.modules, f"kernels_pallas.{command}", raising=False)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        runpy.run_module(f"kernels_pallas.{command}", run_name="__main__")
    assert isinstance(end.value, SystemExit) and end.value.code == 130
    assert capsys.readouterr().err == f"python -m kernels_pallas.{command}: interrupted\n"


@pytest.fixture
def interruptible():
    """Child processes get SIGINT, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("jobs", "delay"), [("1", 0), ("2", 3)], ids=str)
def test_bench_without_a_gpu_says_what_it_will_do_and_can_be_interrupted(jobs, delay, interruptible):
    """As Ctrl-C does in a terminal, the signal goes to all processes of the group."""
    with subprocess.Popen(
        [sys.executable, "-m", "kernels_pallas.bench", "modulated_norm", "--jobs", jobs],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert first.startswith("No GPU: timing 33 passes of 11 cases on the CPU"), first
        process.stderr.readline()
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest == "python -m kernels_pallas.bench: interrupted\n"
