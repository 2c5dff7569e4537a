"""Eight CPU devices, and array annotations checked: what every test runs under."""

import importlib.util
import os
from pathlib import Path

import jaxtyping
import pytest


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
