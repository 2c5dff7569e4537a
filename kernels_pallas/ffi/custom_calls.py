"""The custom calls of csrc/ as JAX finds them: whether they are built for the device at hand, and how one is called."""

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
PLATFORMS = {"cpu": ("cpu", "cpu"), "gpu": ("cuda", "CUDA")}  # as a device says: as libraries.py and JAX's FFI do

_registered: set[str] = set()


def why_not(library: str | None = None) -> str | None:
    """None where they run on the device that code traced now will run on; else the reason, with the cure.

    `library` is "cutlass", which is for GPUs alone; None is the one of the device's platform.
    """
    if backend.interpret():
        return "is a custom call, which cannot be interpreted"
    platform = backend.target().platform
    if platform not in PLATFORMS:
        return f"is written for CPUs and NVIDIA GPUs, got {platform}"
    of_platform, jaxs = PLATFORMS[platform]
    name = library or of_platform
    if name == "cutlass" and platform != "gpu":
        return f"is written for NVIDIA GPUs, got {platform}"
    if name not in _registered:
        path = libraries.built(name)
        try:
            if not path.exists():
                return f"is not built here: python -m kernels_pallas.build {name}"
            loaded = ctypes.CDLL(str(path))
            handlers = {function: getattr(loaded, function) for function in NAMES[name]}
        except (OSError, AttributeError) as error:  # cut short, of another system, not ours to read
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
    """The result of a custom call; under vmap, of one call after another where there is no better way."""
    run = jax.ffi.ffi_call(
        target, out, vmap_method=vmap_method, input_output_aliases=aliases, has_side_effect=has_side_effect
    )
    return run(*arrays, **static)
