"""Memory and time of one train step, to compare recipes: non-private training and the DP-SGD implementations."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dito_jax.errors import UserError
from dito_jax.training.compiling import compile_step
from dito_jax.training.program import Program
from kernels_pallas import hardware


STEPS = 5
REFUSALS = (UserError, NotImplementedError, jax.errors.JaxRuntimeError)  # errors that are reported in the table
HEAD = "| recipe | peak GiB per device | memory ratio | ms per step | time ratio | |\n|---|---|---|---|---|---|"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one recipe's train step; None if unknown."""

    name: str
    peak_bytes: int | None = None  # of one device
    milliseconds: float | None = None  # median of STEPS; None also for compile-only devices
    reason: str = ""  # why values are missing, or a note


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A compiled step that has not run yet and holds no device memory."""

    program: Program
    init: Any
    step: jax.stages.Compiled
    peak_bytes: int | None  # of one device: arguments, results and temporaries


def prepare(program: Program, mesh: jax.sharding.Mesh) -> Prepared:
    """AOT-compiles the step of a Program for its mesh, which may be compile-only."""
    with jax.set_mesh(mesh):
        step, _ = compile_step(program.step, program.state, program.batch)
        there = mesh.devices.flat[0] in jax.devices()
        return Prepared(program, program.init.lower().compile() if there else None, step, _peak_bytes(step))


def _peak_bytes(step: jax.stages.Compiled) -> int | None:
    """Arguments, results and temporaries. XLA's own peak excludes temporaries on CPUs and is 1 % lower on GPUs."""
    memory = step.memory_analysis()
    if memory is None:
        return None
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + new + memory.temp_size_in_bytes


def milliseconds(prepared: Prepared, steps: int = STEPS) -> list[float]:
    """Wall time in ms of each of `steps` steps on a random batch, after one warm-up step."""
    state, batch = prepared.init(), _noise(prepared.program)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(prepared.step(state, batch))
        times.append((time.perf_counter() - start) * 1e3)
    return times[1:]


def costs(recipes: Mapping[str, Callable[[], Program]], mesh: jax.sharding.Mesh) -> Iterator[Cost]:
    """The cost of each recipe, a function that makes its Program; a recipe that fails gets the reason."""
    for name, recipe in recipes.items():
        peak = median = None
        try:
            with jax.set_mesh(mesh):
                prepared = prepare(recipe(), mesh)
                peak = prepared.peak_bytes
                if prepared.init is not None:
                    median = float(np.median(milliseconds(prepared)))
        except REFUSALS as error:
            yield Cost(name, peak, reason=str(error).partition("\n")[0])
        else:
            yield Cost(name, peak, median, _short(peak, mesh))


def table(rows: Iterable[Cost]) -> Iterator[str]:
    """Yields the lines of a Markdown table as the rows arrive; ratios are to the first row."""
    yield HEAD
    first = None
    for row in rows:
        first = first or row
        memory = _cells(row.peak_bytes, first.peak_bytes, unit=2**30)
        yield f"| {row.name} | {memory} | {_cells(row.milliseconds, first.milliseconds)} | {row.reason} |"


def _cells(figure: float | None, of: float | None, unit: float = 1) -> str:
    if figure is None:
        return "- | -"
    return f"{figure / unit:.4g} | {f'{figure / of:.2f}' if of else '-'}"


def _short(peak_bytes: int | None, mesh: jax.sharding.Mesh) -> str:
    """A note if the peak exceeds the memory of the GPU; AOT compilation does not check this."""
    gpu = hardware.by_device_kind(mesh.devices.flat[0].device_kind)
    if gpu is None or peak_bytes is None or peak_bytes <= gpu.memory:
        return ""
    return f"does not fit: the GPU has {gpu.memory / 2**30:.4g} GiB"


def _noise(program: Program) -> dict[str, jax.Array]:
    """A random batch: normal images, class 0, random keys, no padding."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == np.uint32:
            return rng.integers(0, 2**32, leaf.shape, np.uint32)
        floating = np.issubdtype(leaf.dtype, np.floating)
        return (rng.standard_normal(leaf.shape) if floating else np.zeros(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(lambda leaf: jax.device_put(draw(leaf), leaf.sharding), program.batch)
