"""Compilation of the train step: time of each stage, cache hit or miss, peak memory."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax


CACHE_ANSWERS = {"/jax/compilation_cache/cache_hits": True, "/jax/compilation_cache/cache_misses": False}


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """Cost of compiling one jitted function."""

    trace_seconds: float  # Python to jaxpr
    lower_seconds: float  # jaxpr to StableHLO
    compile_seconds: float  # StableHLO to machine code, or reading it from the cache
    cache_hit: bool | None  # None without a persistent cache
    peak_bytes: int | None  # per device, with arguments and results; None if XLA does not report it

    def line(self) -> str:
        """The report as one line of text."""
        cache = {True: "cache hit", False: "cache miss", None: "no cache"}[self.cache_hit]
        peak = "unknown" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:,.1f} MiB"
        return (
            f"traced in {self.trace_seconds:.2f} s, lowered in {self.lower_seconds:.2f} s, "
            f"compiled in {self.compile_seconds:.2f} s ({cache}), peak memory {peak} per device"
        )

    def asdict(self) -> dict[str, float | int | bool | None]:
        """The report as a dict, for metrics.jsonl."""
        return dataclasses.asdict(self)


def compile_step(jitted: Any, *args: Any) -> tuple[jax.stages.Compiled, CompileReport]:
    """AOT-compiles `jitted` (a jax.jit function) for `args` (arrays or ShapeDtypeStructs) and reports the cost."""
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


@contextlib.contextmanager
def _cache_answers() -> Iterator[list[bool]]:
    """Yields a list that receives, for each cache look-up inside the block, whether it was a hit."""
    answers: list[bool] = []

    def listen(event: str, **_: str | int) -> None:
        if event in CACHE_ANSWERS:
            answers.append(CACHE_ANSWERS[event])

    jax.monitoring.register_event_listener(listen)
    try:
        yield answers
    finally:
        jax.monitoring.unregister_event_listener(listen)
