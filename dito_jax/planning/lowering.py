"""The train step as jaxpr, StableHLO or optimized HLO, for local devices or AOT-compiled for other GPUs."""

import dataclasses
import re
from typing import Literal

import jax
import numpy as np

from dito_jax.errors import UserError
from dito_jax.sharding import MeshConfig, make_mesh
from dito_jax.training.compiling import CompileReport, compile_step
from dito_jax.training.program import Program
from kernels_pallas import deviceless


Stage = Literal["jaxpr", "stablehlo", "optimized"]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """The text of one stage, and the compile report if the step was compiled."""

    stage: Stage
    text: str
    report: CompileReport | None
    memory: object | None  # JAX's CompiledMemoryStats, per device


def planned_devices(gpus: str | None) -> np.ndarray:
    """Compile-only devices for a text such as "8xh200"; the local devices for None.

    Raises:
      UserError: the text has another form, the GPU is unknown, or the compiler's wheels are missing.
    """
    if gpus is None:
        return np.array(jax.devices())
    match = re.fullmatch(r"(\d+)x(\w+)", gpus)
    if match is None:
        raise UserError(f"--gpus: got {gpus!r}; wanted a count and a GPU, e.g. 1xh200 or 8xh200.")
    try:
        return deviceless.devices(match[2], int(match[1]))
    except ValueError as error:
        raise UserError(f"--gpus: {error}") from error


def planned_mesh(config: MeshConfig, gpus: str | None) -> jax.sharding.Mesh:
    """The mesh of a MeshConfig over `planned_devices`."""
    return make_mesh(config, planned_devices(gpus))


def lower_step(program: Program, stage: Stage) -> Lowered:
    """Lowers the train step to a stage; call it under `jax.set_mesh` of the program's mesh."""
    if stage == "optimized":
        compiled, report = compile_step(program.step, program.state, program.batch)
        return Lowered(stage, without_payloads(compiled.as_text() or ""), report, compiled.memory_analysis())
    traced = program.step.trace(program.state, program.batch)
    text = str(traced.jaxpr) if stage == "jaxpr" else traced.lower().as_text()
    return Lowered(stage, without_payloads(text), None, None)


def without_payloads(text: str) -> str:
    """Removes the compiled IR of kernels, long escaped strings, from HLO text."""
    return re.sub(r'\b(ir|module) = "(?:[^"\\]|\\.)*"', r'\1 = "..."', text)
