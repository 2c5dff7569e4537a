"""Block sizes of the Triton loss kernels: tuned if `tune` has an entry, else the defaults here."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax.numpy as jnp

from .. import backend, tuning


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes: the tile of the logits (rows x columns) and the contraction step; powers of two >= 16."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int  # software pipelining: tiles in flight


FORWARD, BACKWARD = "linear_cross_entropy_forward", "linear_cross_entropy_backward"


def blocks_for(kernel: str, dtype, depth: int, columns: int, rows: int, capped: bool) -> Blocks:
    """The block sizes of FORWARD or BACKWARD, for a contraction size `depth` and logits of rows x columns."""
    default = untuned(dtype, columns, capped)
    name, mask = f"{kernel}.triton", f"columns={columns}{' capped' if capped else ''}"
    return tuning.blocks(name, default, dtype=dtype, width=depth, mask=mask, size=rows)


def untuned(dtype, columns: int, capped: bool) -> Blocks:
    """The default block sizes: none spills at the cases' shapes on sm_90a and sm_80."""
    if jnp.dtype(dtype).itemsize == 4:  # full float32 products run on the CUDA cores
        return Blocks(64, 64, 16, 8, 2)
    capability = backend.target().capability
    if capability is not None and capability < 9.0:
        return Blocks(128, 128, 32, 8, 4)
    if capped or columns % 256:  # a soft cap or a mask in the epilogue takes more registers
        return Blocks(128, 128, 64, 8, 4)
    return Blocks(128, 256, 64, 8, 3)


def candidates(default: Blocks, *, dtype: str, width: int, mask: str, size: int) -> Iterator[Blocks]:
    """The search space of `tune`: tiles of 64 to 256, with four warps up to 64 x 128 and eight above."""
    del default, width, mask, size
    if dtype == "float32":
        return
    for rows, columns, depth, stages in itertools.product((64, 128), (64, 128, 256), (32, 64, 128), (3, 4)):
        yield Blocks(rows, columns, depth, 8 if rows * columns > 64 * 128 else 4, stages)
