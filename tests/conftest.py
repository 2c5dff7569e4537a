"""Eight CPU devices, array annotations checked, quick compiles: what every test runs under."""

import gc
import importlib.util
import os
import signal
from pathlib import Path

import jaxtyping
import pytest

from tests import recorded, report


os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a GPU host says JAX_PLATFORMS=cuda, as `make gpu` does
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# XLA's CPU devices wait for each other inside their collectives, in an order that may differ: with as many threads as
# devices, eight of them were seen to wait for ever on a mesh of three axes.
os.environ.setdefault("NPROC", "32")

import jax


jax.config.update("jax_num_cpu_devices", 8)

# Checked where arrays are made and passed on; what runs a process (files, clocks, command lines) takes stand-ins.
CHECKED = ["layers", "models", "diffusion", "data", "evaluation", "training.step", "training.ema"]
if importlib.util.find_spec("beartype"):  # a GPU host need not have it
    jaxtyping.install_import_hook(
        ["kernels_pallas", *(f"dito_jax.{package}" for package in CHECKED)], "beartype.beartype"
    )


# Most of the suite's time is compiling programs that run once or twice: for a CPU they are not optimised, but where a
# test asks for it. Python's collector would look through all that JAX keeps some hundred times a minute.
FULLY_OPTIMIZED = ("optimized", "deviceless", "gpu")
gc.set_threshold(50_000, 20, 20)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and the processes of tests would inherit that


def pytest_addoption(parser):
    parser.addoption(
        "--everything", action="store_true",
        help="run the tests marked exhaustive, and compile what results/compiled/ holds the results of",
    )  # fmt: skip
    recorded.add_options(parser)


def pytest_configure(config):
    config.pluginmanager.register(recorded.Recorded(config))
    config.pluginmanager.register(report.Report())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture, as those of a module compile too."""
    if item.get_closest_marker("exhaustive") and not item.config.getoption("everything"):
        pytest.skip("exhaustive: `make test-all` runs it")
    full = any(item.get_closest_marker(name) for name in FULLY_OPTIMIZED)
    jax.config.update("jax_disable_most_optimizations", not full)


# Linux allows a process 65,530 memory mappings, and a program compiled for the CPU takes several: past them XLA dies.
MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = 40_000


@pytest.fixture(autouse=True)
def few_mappings():
    """Compiled programs are dropped, and compiled again where needed, before a long-lived process runs out."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def unchecked_arrays():
    """Annotations are not enforced, as in a user's process: for tests of what a function itself says of bad arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
