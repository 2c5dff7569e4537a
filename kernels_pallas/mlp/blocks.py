"""Block sizes of the Triton MLP kernels: tuned if `tune` has an entry, else the defaults here."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax.numpy as jnp

from .. import backend, tuning


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes: the output tile (rows x columns) and the contraction step; powers of two >= 16."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int  # software pipelining: tiles in flight


PASSES = ("forward_up", "backward_dz")


def blocks_for(op: str, kernel: str, dtype, depth: int, columns: int, rows: int) -> Blocks:
    """The block sizes of one of PASSES of an op, for a contraction size `depth` and an output of rows x columns."""
    name = f"{op}_{kernel}.triton"
    default = untuned(op, kernel, dtype)
    return tuning.blocks(name, default, dtype=dtype, width=depth, mask=f"columns={columns}", size=rows)


def untuned(op: str, kernel: str, dtype) -> Blocks:
    """The default block sizes: none spills at the cases' shapes on sm_90a and sm_80."""
    if jnp.dtype(dtype).itemsize == 4:  # full float32 products run on the CUDA cores
        return Blocks(64, 64, 16, 8, 2)
    capability = backend.target().capability
    if capability is not None and capability < 9.0:
        return Blocks(128, 64, 32, 8, 4)
    if op == "dense_mlp" and kernel == "forward_up":
        return Blocks(128, 256, 64, 8, 3)
    return Blocks(128, 128, 64, 8, 4 if kernel == "forward_up" else 3)


def candidates(default: Blocks, *, dtype: str, width: int, mask: str, size: int) -> Iterator[Blocks]:
    """The search space of `tune`: tiles of 64 to 256, with four warps up to 64 x 128 and eight above."""
    del default, width, mask, size
    if dtype == "float32":
        return
    for rows, columns, depth, stages in itertools.product((64, 128), (64, 128, 256), (32, 64, 128), (3, 4)):
        yield Blocks(rows, columns, depth, 8 if rows * columns > 64 * 128 else 4, stages)
