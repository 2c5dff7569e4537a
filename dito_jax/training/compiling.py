"""What compiling the step cost: seconds by stage, whether the cache had it, and the memory it will take."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


CACHE_ANSWERS = {"/jax/compilation_cache/cache_hits": True, "/jax/compilation_cache/cache_misses": False}


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """One program, from Python to an executable."""

    trace_seconds: float  # Python to jaxpr
    lower_seconds: float  # jaxpr to StableHLO
    compile_seconds: float  # StableHLO to machine code, or reading it from the cache
    cache_hit: bool | None  # None where no persistent cache was asked
    peak_bytes: int | None  # on each device, arguments and results included; None where XLA does not say

    def line(self) -> str:
        """All of it for a person."""
        cache = {True: "cache hit", False: "cache miss", None: "no cache"}[self.cache_hit]
        peak = "unknown" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:,.1f} MiB"
        return (
            f"traced in {self.trace_seconds:.2f} s, lowered in {self.lower_seconds:.2f} s, "
            f"compiled in {self.compile_seconds:.2f} s ({cache}), peak memory {peak} a device"
        )

    def asdict(self) -> dict[str, float | int | bool | None]:
        """All of it for metrics.jsonl."""
        return dataclasses.asdict(self)


def compile_step(jitted: Any, *args: Any) -> tuple[jax.stages.Compiled, CompileReport]:
    """Compiles `jitted`, a `jax.jit`, for `args`, arrays or `jax.ShapeDtypeStruct`, and says what it cost."""
    start = time.perf_counter()
    traced = jitted.trace(*args)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    with _cache_answers() as answers:
        compiled = lowered.compile()
    compiled_at = time.perf_counter()
    memory = compiled.memory_analysis()
    return compiled, CompileReport(
        trace_seconds=traced_at - start,
        lower_seconds=lowered_at - traced_at,
        compile_seconds=compiled_at - lowered_at,
        cache_hit=answers[-1] if answers else None,
        peak_bytes=None if memory is None else memory.peak_memory_in_bytes,
    )


def enable_compilation_cache(path: str | os.PathLike) -> None:
    """Keeps every compiled program in `path` for later processes, the small ones of a CPU as well."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX opens the cache at the first compilation and then no longer looks at the setting.
    compilation_cache.reset_cache()


@contextlib.contextmanager
def _cache_answers() -> Iterator[list[bool]]:
    """Whether the persistent cache had each program that it was asked for inside the block."""
    answers: list[bool] = []

    def listen(event: str, **_: str | int) -> None:
        if event in CACHE_ANSWERS:
            answers.append(CACHE_ANSWERS[event])

    jax.monitoring.register_event_listener(listen)
    try:
        yield answers
    finally:
        jax.monitoring.unregister_event_listener(listen)
