"""How long a call takes: on a GPU its kernels' time as CUPTI saw them, elsewhere the wall clock.

CUPTI sees every kernel that the process starts, whoever starts it: JAX, and PyTorch beside it, are timed alike,
and what their hosts do between kernels counts for neither. The wall clock counts it, which for a small kernel is
most of the time: figures of a GPU taken by it, where CUPTI cannot be loaded, are upper bounds. `clock` says which
is in use.

A call has several copies of its inputs and takes the next at every run, so that none finds its own in the GPU's
cache: a layer of a model does not either.
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

UNKNOWN_CACHE = 128 * 2**20  # bytes; no GPU that we name has more
MOST_COPIES = 32


@dataclasses.dataclass(frozen=True)
class Call:
    """A compiled function, and the copies of its arguments that it is run with in turn."""

    function: Callable[..., Any]
    copies: Sequence[Arrays]
    wait: Callable[[Any], Any] = jax.block_until_ready
    to_jax: Callable[[Any], Any] = lambda out: out

    def __call__(self, turn: int = 0) -> Any:
        """Runs it with the arguments of one turn, to the end."""
        out = self.function(*self.copies[turn % len(self.copies)])
        self.wait(out)
        return out

    def answer(self) -> Any:
        """What it computes, as JAX arrays."""
        return self.to_jax(self())


def copies(arrays: Arrays, cache: int | None = None) -> list[Arrays]:
    """`arrays` as often as makes them three times the GPU's cache, 32 at most; once where there is no GPU.

    Args:
      cache: bytes of the cache; that of JAX's default device if None.
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
    """One pass of a function of arrays that JAX can differentiate, ready to be timed.

    "forward" is function(*arrays); "backward" is vjp(d_out) alone, after `out, vjp = jax.vjp(function, *arrays)`;
    "both" is the two as one compiled function, which returns (out, gradients). d_out is standard normal.
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
    """Standard normal numbers in the shapes and dtypes of a tree of arrays; the same at every call."""
    leaves, tree = jax.tree.flatten(out)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = lambda key, leaf: jax.random.normal(key, leaf.shape).astype(leaf.dtype)
    return jax.tree.unflatten(tree, [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


@functools.cache
def clock() -> str:
    """ "CUPTI" where JAX's default device is an NVIDIA GPU that can be profiled, else "wall clock"."""
    if jax.default_backend() != "gpu":
        return "wall clock"
    try:
        _by_cupti(Call(jax.jit(jnp.sin), [(jnp.ones(8),)]), 0)
    except (ImportError, RuntimeError):  # not in this jaxlib; no libcupti, or another profiler holds it
        return "wall clock"
    return "CUPTI"


def microseconds(call: Call, turn: int = 0) -> float:
    """One run of an already compiled call, in microseconds: with its next arguments, after a run that is not counted.

    Raises:
      RuntimeError: it launched nothing on the GPU.
    """
    return _by_cupti(call, turn) if clock() == "CUPTI" else _by_wall_clock(call, turn)


def in_turns(calls: Mapping[str, Call], rounds: int, *, first: int = 0) -> dict[str, list[float]]:
    """`rounds` runs of each call, in microseconds; `first` is the number of the first round.

    Every round runs each call once, so that a device that heats up or slows down does so for all alike.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(first, first + rounds):
        for name, call in calls.items():
            samples[name].append(microseconds(call, turn))
    return samples


def copy_gbps(size: int = 2**30) -> float:
    """What this device reaches when it only reads and writes, in 10^9 bytes/s: x -> x + 1 over `size` bytes of x.

    The yardstick for kernels that are bound by memory; a plain copy would be no kernel, and CUPTI not see it.
    """
    x = jnp.arange(size // 4, dtype=jnp.int32)
    plus_one = call(lambda x: x + 1, "forward", [(x,)])
    plus_one()
    times = sorted(in_turns({"copy": plus_one}, 9)["copy"])
    return 2 * size / times[len(times) // 2] / 1e3


class _Turns(jax.stages.Wrapped):
    """A call as CUPTI's wrapper takes it: that runs a function twice, and each run is the next turn's.

    Only what `jax.jit` returns is taken as it is; anything else would be compiled, with its inputs in it.
    """

    def __init__(self, call: Call, turn: int):
        self.call, self.turn = call, turn

    def __call__(self):
        self.turn += 1
        return self.call(self.turn - 1)

    def trace(self, *_, **__):
        raise NotImplementedError("it is only called")

    lower = trace


def _by_cupti(call: Call, turn: int) -> float:
    from jax.experimental.mosaic.gpu import profiler  # needs a jaxlib with GPU support

    # finalize=False keeps CUPTI attached between runs. Each run is preceded by one that is not counted.
    milliseconds = profiler.Cupti(finalize=False).measure(_Turns(call, turn))()[1]
    if milliseconds is None:
        raise RuntimeError("it launched no GPU kernel")
    return milliseconds * 1e3


def _by_wall_clock(call: Call, turn: int) -> float:
    call(turn)  # the counterpart of CUPTI's uncounted run
    start = time.perf_counter()
    call(turn + 1)
    return (time.perf_counter() - start) * 1e6
