"""How long a jitted function takes: on a GPU its kernels' time as CUPTI saw them, elsewhere the wall clock.

The wall clock counts what the host does to start a kernel, which for a small one is most of it: figures of a
GPU taken by it, where CUPTI cannot be loaded, are upper bounds. `clock` says which is in use.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


type Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a jitted function and its arguments


@functools.cache
def clock() -> str:
    """ "CUPTI" where JAX's default device is an NVIDIA GPU that can be profiled, else "wall clock"."""
    if jax.default_backend() != "gpu":
        return "wall clock"
    try:
        _by_cupti(jax.jit(jnp.sin), (jnp.ones(8),))
    except (ImportError, RuntimeError):  # not in this jaxlib; no libcupti, or another profiler holds it
        return "wall clock"
    return "CUPTI"


def microseconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """One run of an already compiled function, in microseconds.

    Raises:
      RuntimeError: it launched nothing on the GPU.
    """
    return _by_cupti(function, arguments) if clock() == "CUPTI" else _by_wall_clock(function, arguments)


def in_turns(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """`rounds` runs of each call, in microseconds.

    Every round runs each call once, so that a device that heats up or slows down does so for all alike.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (function, arguments) in calls.items():
            samples[name].append(microseconds(function, arguments))
    return samples


def _by_cupti(function, arguments) -> float:
    from jax.experimental.mosaic.gpu import profiler  # needs a jaxlib with GPU support

    # finalize=False keeps CUPTI attached between runs. Each run is preceded by one that is not counted.
    milliseconds = profiler.Cupti(finalize=False).measure(function)(*arguments)[1]
    if milliseconds is None:
        raise RuntimeError("it launched no GPU kernel")
    return milliseconds * 1e3


def _by_wall_clock(function, arguments) -> float:
    jax.block_until_ready(function(*arguments))  # the counterpart of CUPTI's uncounted run
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return (time.perf_counter() - start) * 1e6
