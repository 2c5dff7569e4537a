"""Ablation of the fused kernels in one DiT block, forward and backward.

On a GPU the block is timed with each choice of kernels, in turns. For a compile-only GPU the bytes that the compiled
block reads and writes are counted.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dito_jax.models.dit import DiTConfig, Rotation
from dito_jax.models.kernels import KernelsConfig
from dito_jax.planning.hlo import ITEM_BYTES
from dito_jax.planning.lowering import without_payloads
from kernels_pallas.bench import timing


ROUNDS = 20
PLAIN = KernelsConfig(norm="xla", qk_norm_rope="xla", mlp=None)
FUSED = ("norm", "qk_norm_rope", "mlp")  # fields of KernelsConfig


@dataclasses.dataclass(frozen=True)
class BlockRow:
    """Result for one choice of kernels."""

    name: str
    moved: int  # bytes read and written by the instructions of the compiled block
    launches: int  # upper bound of GPU kernel launches: one per such instruction
    microseconds: float | None  # median of ROUNDS; None if the block was only compiled


def choices() -> dict[str, KernelsConfig]:
    """XLA for everything but attention; each fused Triton kernel alone; all fused kernels."""
    alone = {field: dataclasses.replace(PLAIN, **{field: "triton"}) for field in FUSED}
    return {"xla": PLAIN, **alone, "all": dataclasses.replace(PLAIN, **dict.fromkeys(FUSED, "triton"))}


def measure(config: DiTConfig, images: int, mesh: jax.sharding.Mesh) -> list[BlockRow]:
    """A row for each of `choices`: one block in bfloat16 on one device, which may be compile-only."""
    compiled, calls = {}, {}
    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    there = mesh.devices.flat[0] in jax.devices()
    for name, kernels in choices().items():
        function, shapes = _passes(dataclasses.replace(config, kernels=kernels), images)
        with jax.set_mesh(mesh):
            compiled[name] = jax.jit(function, in_shardings=replicated).lower(*shapes).compile()
        if there:
            calls[name] = timing.Call(compiled[name], timing.copies(_numbers(shapes)))
    samples = timing.in_turns(calls, ROUNDS)
    rows = []
    for name, block in compiled.items():
        moved, launches = traffic(without_payloads(block.as_text() or ""))
        rows.append(BlockRow(name, moved, launches, float(np.median(samples[name])) if there else None))
    return rows


def table(rows: list[BlockRow], title: str) -> str:
    """The rows as a Markdown table; ratios are to the first row."""
    head = "| kernels | MB moved | of xla | launches | us | speed-up |\n|---|---|---|---|---|---|"
    lines = []
    for row in rows:
        share = f"{row.moved / rows[0].moved:.2f}"
        timed = ("not measured", "") if row.microseconds is None or rows[0].microseconds is None else (
            f"{row.microseconds:.0f}", f"{rows[0].microseconds / row.microseconds:.2f}")  # fmt: skip
        lines.append(f"| {row.name} | {row.moved / 1e6:.0f} | {share} | {row.launches} | {' | '.join(timed)} |")
    return "\n".join([f"# {title}", "", head, *lines]) + "\n"


def traffic(text: str) -> tuple[int, int]:
    """(bytes read and written, number of such instructions) of the entry computation in optimized HLO text.

    The text must have no loops. Each instruction reads its operands and writes its result once; values inside a fusion
    do not count, and an operand that is broadcast counts with its own size.
    """
    entry = text[text.index("\nENTRY") :]
    sizes: dict[str, int] = {}
    moved = launches = 0
    for match in _INSTRUCTION.finditer(entry):
        size = sum(
            ITEM_BYTES.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d)
            for dtype, dims in _ARRAY.findall(match["type"])
        )
        sizes[match["name"]] = size
        if match["op"] not in _FREE:
            moved += size + sum(sizes.get(name, 0) for name in re.findall(r"%([\w.\-]+)", match["operands"]))
            launches += 1
    return moved, launches


_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<operands>[^)]*)\)", re.MULTILINE
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}


def _numbers(shapes):
    """Normal random arrays with standard deviation 1/8, so that the block's output has about the size of its input."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) / 8, s.dtype), shapes)


def _passes(config: DiTConfig, images: int):
    """(function of a block's parameters and inputs that returns output and gradients, shapes of its arguments)."""
    block = lambda: jax.tree.map(lambda leaf: leaf[0], config.build(nnx.Rngs(0)).blocks)
    graph, params = nnx.split(nnx.eval_shape(block), nnx.Param)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    tokens = config.grid[0] * config.grid[1]
    x = jax.ShapeDtypeStruct((images, tokens, config.width), jnp.bfloat16)
    c = jax.ShapeDtypeStruct((images, config.width), jnp.bfloat16)
    rotation = Rotation.grid(config.grid, config.width // config.num_heads) if config.positions == "rope" else None

    def passes(params, x, c, d_y):
        y, vjp = jax.vjp(lambda params, x, c: nnx.merge(graph, params)(x, c, rotation), params, x, c)
        return y, vjp(d_y)

    return passes, (params, x, c, x)
