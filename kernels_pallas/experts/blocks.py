"""Block sizes of the Triton MoE kernels: tuned if `tune` has an entry, else from the tables here."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax.numpy as jnp

from .. import backend, tuning


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of one kernel: the output tile (rows x columns) and the contraction step; powers of two >= 16."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int  # software pipelining: tiles in flight


NAMES = {
    "forward": "grouped_matmul_forward",
    "dx": "grouped_matmul_backward_dx",
    "dw": "grouped_matmul_backward_dw",
    "up": "expert_mlp_forward_up",
    "down": "expert_mlp_forward_down",
    "dz": "expert_mlp_backward_dz",
    "dw_down": "expert_mlp_backward_dw_down",
    "drows": "expert_mlp_backward_drows",
    "dw_up": "expert_mlp_backward_dw_up",
}


def blocks_for(kernel: str, dtype, depth: int, columns: int, group: int) -> Blocks:
    """The block sizes of one of NAMES, for a contraction size `depth`, output `columns`, and `group` rows per expert.

    A weight gradient contracts rows: its tile is `rows` of the matrix's input dim by `columns` of its output dim.
    """
    default = untuned(kernel, dtype, depth)
    name = f"{NAMES[kernel]}.triton"
    return tuning.blocks(name, default, dtype=dtype, width=depth, mask=f"columns={columns}", size=group)


def untuned(kernel: str, dtype, depth: int) -> Blocks:
    """The default block sizes: none spills at the cases' shapes on sm_90a and sm_80."""
    if jnp.dtype(dtype).itemsize == 4:  # full float32 products run on the CUDA cores
        return Blocks(64, 64, 16, 8, 2)
    if kernel == "dz" and depth % 64:
        return _DZ_MASKED  # masks both in the loop and in the epilogue take more registers
    capability = backend.target().capability
    return (_AMPERE if capability is not None and capability < 9.0 else _HOPPER)[_KIND.get(kernel, kernel)]


def candidates(default: Blocks, *, kernel: str, dtype: str, width: int, mask: str, size: int) -> Iterator[Blocks]:
    """The search space of `tune`: tiles of 64 to 256, with four warps up to 64 x 128 and eight above."""
    del default, width, mask, size
    if dtype == "float32":
        return
    widest = 128 if kernel in ("up", "dz") else 256
    gathers = _KIND.get(kernel) == "dw_gather"
    for rows, columns, depth, stages in itertools.product((64, 128), (64, 128, 256), (32, 64, 128), (3, 4)):
        if columns <= widest:
            num_warps = 8 if rows * columns > 64 * 128 else 4
            yield Blocks(rows, columns, depth, num_warps, 2 * stages - 1 if gathers else stages)


CANDIDATES = {f"{name}.triton": functools.partial(candidates, kernel=kernel) for kernel, name in NAMES.items()}

_KIND = {"down": "forward", "drows": "dx", "dw_down": "dw_gather", "dw_up": "dw_gather"}
_HOPPER = {
    "forward": Blocks(128, 256, 64, 8, 3),
    "dx": Blocks(128, 256, 64, 8, 3),
    "dw": Blocks(128, 256, 64, 8, 3),
    "dw_gather": Blocks(128, 256, 64, 8, 5),  # the loads of the row indices take stages too
    "up": Blocks(128, 128, 64, 8, 4),
    "dz": Blocks(128, 128, 64, 8, 3),
}
_DZ_MASKED = Blocks(128, 64, 32, 8, 3)
_AMPERE = {
    "forward": Blocks(128, 128, 32, 8, 4),
    "dx": Blocks(128, 128, 32, 8, 4),
    "dw": Blocks(128, 128, 32, 8, 4),
    "dw_gather": Blocks(128, 128, 32, 8, 5),
    "up": Blocks(128, 64, 32, 8, 4),
    "dz": Blocks(128, 64, 32, 8, 4),
}
