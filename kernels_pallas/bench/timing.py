"""Timing of a call: on a GPU the time of its kernels as CUPTI records it, elsewhere wall-clock time.

CUPTI records every kernel that the process launches, from JAX or from PyTorch, so both are timed alike, and host time
between kernels is not counted. Wall-clock time includes host time, which is most of the time of a small kernel: GPU
times by the wall clock, used if CUPTI cannot be loaded, are upper bounds. `clock` returns the clock in use.

A call has several copies of its inputs and uses the next copy in each run, so that no run finds its inputs in the GPU's
L2 cache. A layer in a model does not find them there either.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import backend, hardware


type Arrays = tuple[Any, ...]

UNKNOWN_CACHE = 128 * 2**20  # bytes of L2 cache assumed for a GPU that hardware.py does not know
MOST_COPIES = 32


@dataclasses.dataclass(frozen=True)
class Call:
    """A compiled function and copies of its arguments; each run uses the next copy."""

    function: Callable[..., Any]
    copies: Sequence[Arrays]
    wait: Callable[[Any], Any] = jax.block_until_ready
    to_jax: Callable[[Any], Any] = lambda out: out

    def __call__(self, turn: int = 0) -> Any:
        """Runs the function with the arguments of one turn and waits for the result."""
        out = self.function(*self.copies[turn % len(self.copies)])
        self.wait(out)
        return out

    def answer(self) -> Any:
        """The result, as JAX arrays."""
        return self.to_jax(self())


def copies(arrays: Arrays, cache: int | None = None) -> list[Arrays]:
    """Copies of `arrays`: as many as take three times the GPU's L2 cache, at most 32; one copy without a GPU.

    Args:
      cache: size of the L2 cache in bytes; if None, that of JAX's default device.
    """
    cache = _cache_bytes() if cache is None else cache
    size = sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(arrays))
    count = min(max(math.ceil(3 * cache / max(size, 1)), 1), MOST_COPIES)
    return [jax.tree.map(lambda a: jnp.array(a, copy=True), arrays) for _ in range(count)]


def _cache_bytes() -> int:
    if jax.default_backend() != "gpu":
        return 0
    gpu = hardware.by_device_kind(backend.target().kind)
    return gpu.l2_cache if gpu else UNKNOWN_CACHE


def call(function: Callable[..., Any], pass_: str, inputs: Sequence[Arrays]) -> Call:
    """One pass of a differentiable JAX function, ready to be timed.

    "forward" is function(*arrays). "backward" is vjp(d_out) alone, after `out, vjp = jax.vjp(function, *arrays)`.
    "both" is forward and backward in one compiled function, which returns (out, gradients). d_out is standard normal.
    """
    forward = jax.jit(function)
    if pass_ == "forward":
        return Call(forward, inputs)
    d_out = cotangent(jax.eval_shape(forward, *inputs[0]))
    again = lambda: jax.tree.map(jnp.copy, d_out)
    if pass_ == "both":

        def both(arrays, d_out):
            out, vjp = jax.vjp(forward, *arrays)
            return out, vjp(d_out)

        return Call(jax.jit(both), [(arrays, again()) for arrays in inputs])
    with_residuals = jax.jit(functools.partial(jax.vjp, forward))
    return Call(jax.jit(lambda vjp, d_out: vjp(d_out)), [(with_residuals(*a)[1], again()) for a in inputs])


def cotangent(out: Any) -> Any:
    """Standard normal numbers in the shapes and dtypes of a tree of arrays; every call returns the same ones."""
    leaves, tree = jax.tree.flatten(out)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = lambda key, leaf: jax.random.normal(key, leaf.shape).astype(leaf.dtype)
    return jax.tree.unflatten(tree, [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


@functools.cache
def clock() -> str:
    """ "CUPTI" if JAX's default device is an NVIDIA GPU that can be profiled, else "wall clock"."""
    if jax.default_backend() != "gpu":
        return "wall clock"
    try:
        _by_cupti(Call(jax.jit(jnp.sin), [(jnp.ones(8),)]), 0)
    except (ImportError, RuntimeError):  # jaxlib without GPU support; no libcupti, or another profiler uses it
        return "wall clock"
    return "CUPTI"


def microseconds(call: Call, turn: int = 0) -> float:
    """The time of one run of a compiled call, in microseconds, after a warm-up run that is not counted.

    Raises:
      RuntimeError: the call launched no GPU kernel.
    """
    return _by_cupti(call, turn) if clock() == "CUPTI" else _by_wall_clock(call, turn)


def in_turns(calls: Mapping[str, Call], rounds: int, *, first: int = 0) -> dict[str, list[float]]:
    """The times of `rounds` runs of each call, in microseconds; `first` is the number of the first round.

    Every round runs each call once, so that thermal throttling affects all calls alike.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(first, first + rounds):
        for name, call in calls.items():
            samples[name].append(microseconds(call, turn))
    return samples


def copy_gbps(size: int = 2**30) -> float:
    """The memory bandwidth that this device reaches, in 10^9 bytes/s: x -> x + 1 over `size` bytes of x.

    The upper bound for memory-bound kernels. A plain copy is no kernel, so CUPTI would not record it.
    """
    x = jnp.arange(size // 4, dtype=jnp.int32)
    plus_one = call(lambda x: x + 1, "forward", [(x,)])
    plus_one()
    times = sorted(in_turns({"copy": plus_one}, 9)["copy"])
    return 2 * size / times[len(times) // 2] / 1e3


class _Turns(jax.stages.Wrapped):
    """Adapter of a call for CUPTI's wrapper, which runs a function twice; each run uses the next copy of the inputs.

    It is a `Wrapped` because the wrapper would pass anything else to `jax.jit`, with the inputs as constants.
    """

    def __init__(self, call: Call, turn: int):
        self.call, self.turn = call, turn

    def __call__(self):
        self.turn += 1
        return self.call(self.turn - 1)

    def trace(self, *_, **__):
        raise NotImplementedError("this object can only be called")

    lower = trace


def _by_cupti(call: Call, turn: int) -> float:
    from jax.experimental.mosaic.gpu import profiler  # needs a jaxlib with GPU support

    # finalize=False keeps CUPTI attached between runs. CUPTI's wrapper runs each call once before it measures.
    milliseconds = profiler.Cupti(finalize=False).measure(_Turns(call, turn))()[1]
    if milliseconds is None:
        raise RuntimeError("the call launched no GPU kernel")
    return milliseconds * 1e3


def _by_wall_clock(call: Call, turn: int) -> float:
    call(turn)  # the warm-up run that CUPTI's wrapper makes too
    start = time.perf_counter()
    call(turn + 1)
    return (time.perf_counter() - start) * 1e6
