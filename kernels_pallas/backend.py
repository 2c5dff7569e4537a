"""The target device (the one in use, or the one compiled for) and which kernels it supports."""

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
    """Runs Pallas kernels in interpret mode inside this context, so that tests can check them on a CPU."""
    token = _INTERPRET.set(True)
    try:
        yield
    finally:
        _INTERPRET.reset(token)


def interpret() -> bool:
    """Whether `interpret_mode` is active; kernels pass this to `pallas_call`."""
    return _INTERPRET.get()


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that the code being traced will run on."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # as JAX prints it, e.g. "NVIDIA H200"
    capability: float | None  # CUDA compute capability; None where unknown


def target() -> Target:
    """The device of the current mesh (which may be compile-only); without a mesh, JAX's default device."""
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
    """None if Pallas-Triton kernels run: in interpret mode, or on an NVIDIA GPU of Ampere or later. Else the reason."""
    if interpret():
        return None
    device = target()
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU, got {device.kind}"
    if device.capability is None or device.capability < 8.0:
        return f"needs compute capability 8.0 or higher, got {device.capability} ({device.kind})"
    return None


def settle_platform() -> None:
    """Selects the CPU, and says so in one line on stderr, if CUDA wheels are installed but there is no NVIDIA GPU.

    Every command calls this first. Otherwise JAX's CUDA plug-in prints a traceback about missing libraries.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ log: errors only
    if gpu_present() or not cuda_wheels_installed():
        return
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the compiler works without cuDNN
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
        print("No NVIDIA GPU found: running on the CPU; the CUDA wheels are only used to compile.", file=sys.stderr)


def cuda_wheels_installed() -> bool:
    """Whether JAX's CUDA 13 plug-in is installed, to run on a GPU or only to compile for one."""
    plugins = importlib.util.find_spec("jax_plugins")  # the folder exists only if some plug-in is installed
    folders = plugins.submodule_search_locations if plugins else None
    return any(Path(folder, "xla_cuda13").is_dir() for folder in folders or ())


def gpu_present() -> bool:
    """Whether the NVIDIA driver exposes a device (on Linux, or in the Windows Subsystem for Linux)."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
