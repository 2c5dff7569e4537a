"""AOT compilation for NVIDIA GPUs on a machine without a GPU: compile-only devices of XLA's CUDA compiler.

This needs the `deviceless` extra (JAX's CUDA plug-in and the compiler's wheels; no driver, no cuDNN). It shows that a
kernel lowers, compiles with Triton, LLVM and ptxas, and fits in registers and shared memory. It does not show that the
kernel is correct or fast.
"""

import functools
import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

from . import backend
from .hardware import GPUS


def why_not() -> str | None:
    """None if the compiler's wheels are installed, else what to install."""
    if not backend.cuda_wheels_installed() or not all(compiler(t).exists() for t in ("ptxas", "nvdisasm")):
        return "needs the CUDA compiler wheels: pip install -e '.[deviceless]'"
    return None


@functools.cache
def devices(name: str, count: int = 1) -> np.ndarray:
    """`count` compile-only devices on one host, of the GPU called `name` in hardware.GPUS.

    Raises:
      ValueError: the GPU is not in hardware.GPUS, or the wheels are missing.
    """
    if name not in GPUS:
        raise ValueError(f"no GPU named {name!r}; choose from {', '.join(GPUS)}.")
    if reason := why_not():
        raise ValueError(f"cannot compile for {name!r}: {reason}.")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # JAX reads it when the plug-ins are loaded,
    jax.devices()  # which happens here unless the process has used a device before
    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        target_config=GPUS[name].target_config(),
        topology=f"1x1x{count}",
    )
    return np.array(description.devices)


def mesh(name: str) -> jax.sharding.Mesh:
    """A mesh of one compile-only device. Pallas compiles for the GPU of the current mesh."""
    return jax.sharding.Mesh(devices(name), ("device",))


def compiler(tool: str) -> Path:
    """The path of NVIDIA's "ptxas" or "nvdisasm" in its wheel."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    found = [p for root in roots for p in Path(root).glob(f"cu13/bin/{tool}")]
    return found[0] if found else Path(f"{tool}-not-installed")
