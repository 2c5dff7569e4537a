"""How the Triton kernels cut their work: as measured where `tune` has measured; else by these tables."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax.numpy as jnp

from .. import backend, tuning


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A tile of the output, and what is contracted at a time; powers of two >= 16."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int  # tiles in flight between memory and the tensor cores


PASSES = ("forward_up", "backward_dz")


def blocks_for(op: str, kernel: str, dtype, depth: int, columns: int, rows: int) -> Blocks:
    """The blocks of one of PASSES of an op, for a contraction of `depth` and an output of rows x columns."""
    name = f"{op}_{kernel}.triton"
    default = untuned(op, kernel, dtype)
    return tuning.blocks(name, default, dtype=dtype, width=depth, mask=f"columns={columns}", size=rows)


def untuned(op: str, kernel: str, dtype) -> Blocks:
    """Without a measurement: none spills at the cases' shapes on sm_90a and sm_80."""
    if jnp.dtype(dtype).itemsize == 4:  # products that keep all of float32 run on the plain cores
        return Blocks(64, 64, 16, 8, 2)
    capability = backend.target().capability
    if capability is not None and capability < 9.0:
        return Blocks(128, 64, 32, 8, 4)
    if op == "dense_mlp" and kernel == "forward_up":
        return Blocks(128, 256, 64, 8, 3)
    return Blocks(128, 128, 64, 8, 4 if kernel == "forward_up" else 3)


def candidates(default: Blocks, *, dtype: str, width: int, mask: str, size: int) -> Iterator[Blocks]:
    """What `tune` tries: tiles of 64 to 256, four warps for each 64 rows or eight."""
    del default, width, mask, size
    if dtype == "float32":
        return
    for rows, columns, depth, stages in itertools.product((64, 128), (64, 128, 256), (32, 64, 128), (3, 4)):
        yield Blocks(rows, columns, depth, 8 if rows * columns > 64 * 128 else 4, stages)
