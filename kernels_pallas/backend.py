"""What the device at hand, or the one compiled for, can run."""

import contextlib
import contextvars
import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import jax

from .hardware import by_device_kind


_INTERPRET = contextvars.ContextVar("interpret", default=False)


@contextlib.contextmanager
def interpret_mode():
    """Runs Pallas kernels as plain JAX, so that a CPU can check their arithmetic."""
    token = _INTERPRET.set(True)
    try:
        yield
    finally:
        _INTERPRET.reset(token)


def interpret() -> bool:
    """Whether `interpret_mode` is in force; what kernels pass to `pallas_call`."""
    return _INTERPRET.get()


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that code traced now will run on."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # as JAX prints it, e.g. "NVIDIA H200"
    capability: float | None  # CUDA compute capability; None where unknown


def target() -> Target:
    """The device of the mesh in force, which may be compile-only; else JAX's default device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        platform, kind = abstract.platform or "cpu", abstract.device_kind
    else:
        device = jax.devices()[0]
        platform, kind = device.platform, device.device_kind
    known = by_device_kind(kind)
    if known is not None:
        return Target(platform, kind, known.capability)
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return Target(platform, kind, float(capability) if capability else None)


def why_not_triton() -> str | None:
    """None where Pallas-Triton kernels run: interpret mode, or an NVIDIA GPU since Ampere."""
    if interpret():
        return None
    device = target()
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU, got {device.kind}"
    if device.capability is None or device.capability < 8.0:
        return f"needs compute capability 8.0, got {device.capability} ({device.kind})"
    return None


def settle_platform() -> None:
    """Chooses the CPU, in one line, where CUDA wheels are installed and no NVIDIA GPU is there.

    Every command calls it first: without it JAX's plug-in prints a traceback about libraries that the machine cannot
    use.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ log: errors only
    if gpu_present() or not cuda_wheels_installed():
        return
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the compiler works without cuDNN
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
        print("No NVIDIA GPU here: the CUDA wheels only compile, the CPU runs.", file=sys.stderr)


def cuda_wheels_installed() -> bool:
    """Whether JAX's plug-in for CUDA 13 is there, for a GPU or only to compile for one."""
    plugins = importlib.util.find_spec("jax_plugins")  # a folder that any plug-in makes; none on a plain CPU
    folders = plugins.submodule_search_locations if plugins else None
    return any(Path(folder, "xla_cuda13").is_dir() for folder in folders or ())


def gpu_present() -> bool:
    """Whether the NVIDIA driver shows a device (Linux, or Windows' Linux subsystem)."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
