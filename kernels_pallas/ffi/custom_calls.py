"""Loading the custom calls of csrc/, registering them with JAX, and calling them."""

import ctypes
from typing import Any

import jax

from .. import backend
from . import libraries


NAMES = {
    "cpu": ("secure_normal", "state_digest"),
    "cuda": ("secure_normal", "state_digest", "range_push", "range_pop"),
    "cutlass": ("grouped_gemm",),
}
# The platform of a device: its name in libraries.py, and its name in JAX's FFI.
PLATFORMS = {"cpu": ("cpu", "cpu"), "gpu": ("cuda", "CUDA")}

_registered: set[str] = set()


def why_not(library: str | None = None) -> str | None:
    """None if the custom calls run on the target device, else the reason and the remedy.

    `library` is "cutlass", which is for GPUs only, or None for the library of the device's platform.
    """
    if backend.interpret():
        return "is a custom call, which has no interpret mode"
    platform = backend.target().platform
    if platform not in PLATFORMS:
        return f"supports CPUs and NVIDIA GPUs, got {platform}"
    of_platform, jaxs = PLATFORMS[platform]
    name = library or of_platform
    if name == "cutlass" and platform != "gpu":
        return f"supports NVIDIA GPUs, got {platform}"
    if name not in _registered:
        path = libraries.built(name)
        try:
            if not path.exists():
                return f"is not built; run python -m kernels_pallas.build {name}"
            loaded = ctypes.CDLL(str(path))
            handlers = {function: getattr(loaded, function) for function in NAMES[name]}
        except (OSError, AttributeError) as error:  # truncated, built for another system, or not readable
            return f"cannot be loaded ({error}); remove {path} and run python -m kernels_pallas.build {name}"
        for function, handler in handlers.items():
            jax.ffi.register_ffi_target(function, jax.ffi.pycapsule(handler), platform=jaxs)
        _registered.add(name)
    return None


def call(
    target: str,
    out: Any,
    *arrays: jax.Array,
    aliases: dict[int, int] | None = None,
    vmap_method: str = "sequential",
    has_side_effect: bool = False,
    **static: Any,
):
    """The result of a custom call. By default vmap makes one call after another."""
    run = jax.ffi.ffi_call(
        target, out, vmap_method=vmap_method, input_output_aliases=aliases, has_side_effect=has_side_effect
    )
    return run(*arrays, **static)
