"""Block sizes of the Triton DP-SGD kernels: tuned if `tune` has an entry, else the defaults here."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax.numpy as jnp
from jax.experimental import pallas as pl

from .. import backend, tuning
from ..hardware import by_device_kind


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of one kernel: the tile (rows x columns) and the contraction step; powers of two >= 16.

    The tiles of "pairs" are rows x rows; those of the others are `rows` of the input dim by `columns` of the output
    dim.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int  # software pipelining: tiles in flight


NAMES = {
    "pairs": "ghost_norm_sq_forward_pairs",
    "matrix": "ghost_norm_sq_forward_matrix",
    "clip": "clip_reduce_forward",
}
USUAL_CORES = 132  # the SMs of an H200, assumed for a device that hardware.py does not know


def blocks_for(kernel: str, a, g, grouped: bool = False) -> Blocks:
    """The block sizes of one of NAMES, for inputs (B, T, D) and gradients (B, T, F)."""
    (B, T, D), F = a.shape, g.shape[2]
    default = untuned(kernel, a.dtype, B, T, D, F)
    name, mask = f"{NAMES[kernel]}.triton", f"rows={T} columns={F}{' grouped' if grouped else ''}"
    return tuning.blocks(name, default, dtype=a.dtype, width=D, mask=mask, size=B)


def untuned(kernel: str, dtype, B: int, T: int, D: int, F: int) -> Blocks:
    """The default block sizes: none spills at the cases' shapes on sm_90a and sm_80."""
    if jnp.dtype(dtype).itemsize == 4:  # full float32 products run on the CUDA cores
        return Blocks(64, 64, 16, 8 if kernel == "matrix" else 4, 2)
    capability = backend.target().capability
    depth, stages = (32, 4) if capability is not None and capability < 9.0 else (64, 3)
    if kernel == "pairs":
        tiles = pl.cdiv(T, 128)  # large tiles read less memory, if there are enough of them to fill the GPU
        rows = 128 if B * tiles * (tiles + 1) // 2 >= cores() else 64
        if D == F and depth == 64:  # the two loops then share their offsets, take 255 registers and spill
            depth, stages = 32, 4
        return Blocks(rows, rows, depth, 8 if rows == 128 else 4, stages)
    # "clip" has two accumulators, for the example and for the sum over examples; "matrix" has one.
    widest = 256 if kernel == "matrix" and depth == 64 else 128
    rows, columns = _fitting(D, 64, 128), _fitting(F, 16, widest)
    return Blocks(rows, columns, _fitting(T, 16, depth), 8 if rows * columns > 64 * 128 else 4, stages)


def cores() -> int:
    """The number of SMs of the target device."""
    known = by_device_kind(backend.target().kind)
    return known.cores if known else USUAL_CORES


def _fitting(size: int, least: int, most: int) -> int:
    """The next power of two of `size`, clipped to `least` and `most`, which are powers of two."""
    return max(least, min(most, pl.next_power_of_2(size)))


def candidates(default: Blocks, *, kernel: str, dtype: str, width: int, mask: str, size: int) -> Iterator[Blocks]:
    """The search space of `tune`: tiles of 64 to 256, with four warps up to 64 x 128 and eight above."""
    del default, width, mask, size
    if dtype == "float32":
        return
    for rows, columns, depth, stages in itertools.product((64, 128), (64, 128, 256), (32, 64, 128), (3, 4)):
        if rows == columns if kernel == "pairs" else columns <= (256 if kernel == "matrix" else 128):
            yield Blocks(rows, columns, depth, 8 if rows * columns > 64 * 128 else 4, stages)


CANDIDATES = {
    kernel: {f"{name}.triton": functools.partial(candidates, kernel=kernel)} for kernel, name in NAMES.items()
}
