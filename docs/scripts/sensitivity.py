"""Writes the table of measured sensitivities of docs/privacy.md: how far one example moves the clipped sum.

    JAX_PLATFORMS=cpu python docs/scripts/sensitivity.py

All examples of a batch are equal, which makes their sum as long as sums can be; one of them is left out. Every backend,
compute dtype, batch size and number of accumulation steps is measured for five small networks. A backend that refuses a
network has a row that says so. Takes some ten minutes of CPU time.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dito_jax.diffusion.loss import LossConfig
from dito_jax.layers.linear import linear
from dito_jax.models.dit import DiTConfig
from dito_jax.models.moe_dit import MoEDiTConfig
from dito_jax.privacy.clipping import BACKENDS, ClippedSum
from dito_jax.privacy.step import accumulated, draw_losses
from dito_jax.training.state import split_model
from dito_jax.training.step import cast


PAGE = Path(__file__).parents[1] / "privacy.md"
BEGIN, END = "<!-- begin: `python docs/scripts/sensitivity.py` writes this table -->", "<!-- end -->"
SIZE: dict[str, Any] = dict(image_shape=(4, 4, 1), num_classes=3, patch=2, depth=2, width=16, num_heads=2)
BATCHES, ACCUMULATION, DTYPES = (4, 256, 4096), (1, 4), ("float32", "bfloat16")
CLIP_NORM = 1.0
MICROBATCH = 64


class Shared(nnx.Module):
    """A network that uses its one matrix in every step of a scan, or in its output layer too."""

    def __init__(self, tied: bool):
        self.tied, self.matrix = tied, linear(8, 8, ". .", bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        if self.tied:
            return jnp.tanh(self.matrix(x)) @ self.matrix.kernel[...].T
        return jax.lax.scan(lambda x, _: (x + self.matrix(x), None), x, None, length=4)[0]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, the losses of rows, and one example."""

    graph: nnx.GraphDef
    params: nnx.State
    losses: Callable
    example: dict[str, jax.Array]


def diffusion(config: DiTConfig) -> Problem:
    """A diffusion transformer with parameters away from their zeros."""
    graph, _ = split_model(config)
    leaves, tree = jax.tree.flatten(nnx.state(config.build(nnx.Rngs(0)), nnx.Param))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    image, noise = jax.random.normal(jax.random.key(2), (2, 1, 1, *config.image_shape))
    ones = jnp.ones((1, 1))
    example = dict(image=image, noise=noise, t=0.4 * ones, label=ones.astype(jnp.int32), weight=ones)
    losses = functools.partial(draw_losses, config=LossConfig())
    return Problem(graph, jax.tree.unflatten(tree, moved), losses, example)


def shared(tied: bool) -> Problem:
    """A network whose matrix is used several times."""
    graph, params = nnx.split(Shared(tied), nnx.Param)
    example = {"x": jax.random.normal(jax.random.key(0), (1, 1, 3, 8)), "weight": jnp.ones((1, 1))}
    return Problem(graph, params, lambda network, rows: jnp.sum(jnp.square(network(rows["x"])), (1, 2)), example)


def problems() -> dict[str, Problem]:
    """The five networks by name."""
    experts = MoEDiTConfig(**SIZE, num_experts=4, active_experts=2, balance="example", expert_hidden=16)
    return {
        "DiT": diffusion(DiTConfig(**SIZE)),
        "MoE-DiT": diffusion(experts),
        "DiT with adapters": diffusion(DiTConfig(**SIZE, adapter_rank=2)),
        "one matrix in a scan": shared(tied=False),
        "tied output layer": shared(tied=True),
    }


def move(problem: Problem, backend, dtype, batch: int, parts: int) -> float:
    """How far the sum of `batch` equal examples moves when one is left out, in clipping norms."""
    narrowed = functools.partial(cast, dtype=dtype)
    clipped_sum = ClippedSum(
        problem.graph, problem.losses, CLIP_NORM, backend, min(MICROBATCH, batch // parts), narrowed,
        narrow=dtype != "float32",
    )  # fmt: skip
    examples = jax.tree.map(lambda a: jnp.repeat(a, batch, axis=0), problem.example)

    @jax.jit
    def total(params, examples, padding):  # all arguments: XLA would compute with constants while it compiles
        return accumulated(clipped_sum, params, nnx.State({}), examples, padding, parts)

    (whole, measured), (without, _) = (
        total(problem.params, examples, jnp.arange(batch) < left_out) for left_out in (0, 1)
    )
    assert float(measured.norm[0]) > 2 * CLIP_NORM, "the example is not clipped"
    leaves = zip(*map(jax.tree.leaves, (whole, without)), strict=True)
    return float(np.sqrt(sum(np.sum(np.square(np.float64(a) - np.float64(b))) for a, b in leaves))) / CLIP_NORM


def largest(problem: Problem, backend, dtype) -> str:
    """The largest move over batch sizes and accumulation steps, or "refused"."""
    try:
        return f"{max(move(problem, backend, dtype, *how) for how in itertools.product(BATCHES, ACCUMULATION)):.6f}"
    except ValueError as error:
        assert "wanted" in str(error)
        return "refused"


def table() -> str:
    """The table, a row a network and backend."""
    lines = ["| network | backend | " + " | ".join(DTYPES) + " |", "|---" * (2 + len(DTYPES)) + "|"]
    for name, problem in problems().items():
        for backend in BACKENDS:
            lines.append(f"| {name} | `{backend}` | " + " | ".join(largest(problem, backend, d) for d in DTYPES) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END, 1)[1]}")
