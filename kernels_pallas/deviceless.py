"""Compile-only NVIDIA GPUs: XLA's CUDA compiler with no GPU in the machine.

Needs the `deviceless` extra (the CUDA plug-in and the compiler's own wheels; no driver, no cuDNN). What it proves:
the kernel lowers, passes Triton, LLVM and ptxas, and fits; what it does not: that it is right, or fast.
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
    """None where the wheels are installed, else what to install."""
    if not backend.cuda_wheels_installed() or not all(compiler(t).exists() for t in ("ptxas", "nvdisasm")):
        return "needs the CUDA compiler wheels: pip install -e '.[deviceless]'"
    return None


@functools.cache
def devices(name: str, count: int = 1) -> np.ndarray:
    """`count` compile-only devices of the GPU called `name` in hardware.GPUS, as one host holds them.

    Raises:
      ValueError: the GPU is not one we name, or the wheels are missing.
    """
    if name not in GPUS:
        raise ValueError(f"no GPU named {name!r}; choose from {', '.join(GPUS)}.")
    if reason := why_not():
        raise ValueError(f"cannot compile for {name!r}: {reason}.")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # read when the plug-ins load, which is
    jax.devices()  # here, unless the process has touched a device before
    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        target_config=GPUS[name].target_config(),
        topology=f"1x1x{count}",
    )
    return np.array(description.devices)


def mesh(name: str) -> jax.sharding.Mesh:
    """One compile-only device as a mesh; Pallas reads the GPU to compile for off the mesh in force."""
    return jax.sharding.Mesh(devices(name), ("device",))


def compiler(tool: str) -> Path:
    """NVIDIA's "ptxas" or "nvdisasm", from its wheel."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    found = [p for root in roots for p in Path(root).glob(f"cu13/bin/{tool}")]
    return found[0] if found else Path(f"{tool}-not-installed")
