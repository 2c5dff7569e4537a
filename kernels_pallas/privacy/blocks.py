"""How the Triton kernels cut their work: as measured where `tune` has measured; else by these tables."""

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
    """How one kernel cuts its work: a tile, and what it contracts at a time; powers of two >= 16.

    "pairs" has square tiles of rows x rows; the others `rows` of a matrix's inputs by `columns` of its outputs.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int  # tiles in flight between memory and the tensor cores


NAMES = {
    "pairs": "ghost_norm_sq_forward_pairs",
    "matrix": "ghost_norm_sq_forward_matrix",
    "clip": "clip_reduce_forward",
}
USUAL_CORES = 132  # of an H200, for a device whose cores are not known


def blocks_for(kernel: str, a, g, grouped: bool = False) -> Blocks:
    """The blocks of one of NAMES, for inputs (B, T, D) and gradients (B, T, F)."""
    (B, T, D), F = a.shape, g.shape[2]
    default = untuned(kernel, a.dtype, B, T, D, F)
    name, mask = f"{NAMES[kernel]}.triton", f"rows={T} columns={F}{' grouped' if grouped else ''}"
    return tuning.blocks(name, default, dtype=a.dtype, width=D, mask=mask, size=B)


def untuned(kernel: str, dtype, B: int, T: int, D: int, F: int) -> Blocks:
    """Without a measurement: none spills at the cases' shapes on sm_90a and sm_80."""
    if jnp.dtype(dtype).itemsize == 4:  # products that keep all of float32 run on the plain cores
        return Blocks(64, 64, 16, 4 if kernel == "clip" else 8, 2)
    capability = backend.target().capability
    depth, stages = (32, 4) if capability is not None and capability < 9.0 else (64, 3)
    if kernel == "pairs":
        tiles = pl.cdiv(T, 128)  # large ones read less, where there are enough of them
        rows = 128 if B * tiles * (tiles + 1) // 2 >= cores() else 64
        if D == F and depth == 64:  # the products' loops then share their offsets: 255 registers, and it spills
            depth, stages = 32, 4
        return Blocks(rows, rows, depth, 8 if rows == 128 else 4, stages)
    # "clip" holds two tiles of sums, of an example and of all; "matrix" one.
    widest = 256 if kernel == "matrix" and depth == 64 else 128
    rows, columns = _fitting(D, 64, 128), _fitting(F, 16, widest)
    return Blocks(rows, columns, _fitting(T, 16, depth), 8 if rows * columns > 64 * 128 else 4, stages)


def cores() -> int:
    """How many programs the device at hand runs at once, at one a core."""
    known = by_device_kind(backend.target().kind)
    return known.cores if known else USUAL_CORES


def _fitting(size: int, least: int, most: int) -> int:
    """The power of two at or above `size`, within bounds that are ones."""
    return max(least, min(most, pl.next_power_of_2(size)))


def candidates(default: Blocks, *, kernel: str, dtype: str, width: int, mask: str, size: int) -> Iterator[Blocks]:
    """What `tune` tries: tiles of 64 to 256, four warps for each 64 rows or eight."""
    del default, width, mask, size
    if dtype == "float32":
        return
    for rows, columns, depth, stages in itertools.product((64, 128), (64, 128, 256), (32, 64, 128), (3, 4)):
        if rows == columns if kernel == "pairs" else columns <= (256 if kernel == "matrix" else 128):
            yield Blocks(rows, columns, depth, 8 if rows * columns > 64 * 128 else 4, stages)


CANDIDATES = {
    kernel: {f"{name}.triton": functools.partial(candidates, kernel=kernel)} for kernel, name in NAMES.items()
}
