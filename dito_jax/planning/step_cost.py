"""What one train step takes, in memory and in time, so that recipes can be compared: private ones with others."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from dito_jax.training.compiling import compile_step
from dito_jax.training.program import Program


STEPS = 5


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A compiled step that was not run yet: it holds no memory of a device."""

    program: Program
    init: Any
    step: jax.stages.Compiled
    peak_bytes: int | None  # of one device


def prepare(program: Program, mesh: jax.sharding.Mesh) -> Prepared:
    """Compiles a program's step for its mesh, which may be compile-only."""
    with jax.set_mesh(mesh):
        step, report = compile_step(program.step, program.state, program.batch)
        there = mesh.devices.flat[0] in jax.devices()
        return Prepared(program, program.init.lower().compile() if there else None, step, report.peak_bytes)


def milliseconds(prepared: Prepared, steps: int = STEPS) -> list[float]:
    """The wall clock of `steps` steps on a batch of noise, after one that is not counted."""
    state, batch = prepared.init(), _noise(prepared.program)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(prepared.step(state, batch))
        times.append((time.perf_counter() - start) * 1e3)
    return times[1:]


def _noise(program: Program) -> dict[str, jax.Array]:
    """A full batch: normal images, class 0, random keys, no padding."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == np.uint32:
            return rng.integers(0, 2**32, leaf.shape, np.uint32)
        floating = np.issubdtype(leaf.dtype, np.floating)
        return (rng.standard_normal(leaf.shape) if floating else np.zeros(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(lambda leaf: jax.device_put(draw(leaf), leaf.sharding), program.batch)
