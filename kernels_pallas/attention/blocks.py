"""Block sizes of the attention kernels: tuned if `tune` has an entry; else, for Triton, from the tables here."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax.numpy as jnp

from .. import backend, tuning


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of one kernel: powers of two, at least 16."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int  # software pipelining: tiles in flight


NAMES = {
    "forward": "flash_attention_forward.triton",
    "dq": "flash_attention_backward_dq.triton",
    "dkv": "flash_attention_backward_dkv.triton",
    "tangent": "flash_attention_tangent_forward.triton",
}


def blocks_for(kernel: str, q, k, mask) -> Blocks:
    """The block sizes of one of NAMES. A tuned entry is looked up by the length that a program loops over."""
    default = untuned(kernel, q.shape[-1], q.dtype, mask is not None)
    return measured(NAMES[kernel], default, q, mask, walked=q if kernel == "dkv" else k)


def measured[B](name: str, default: B, q, mask, *, walked) -> B:
    """The tuned block sizes of a kernel, else the default; `walked` is the array whose length a program loops over."""
    kind = "none" if mask is None else mask.kind
    return tuning.blocks(name, default, dtype=q.dtype, width=q.shape[-1], mask=kind, size=walked.shape[1])


def untuned(kernel: str, width: int, dtype, masked: bool) -> Blocks:
    """The default block sizes. At the cases' shapes they do not spill on sm_90a and sm_80; at other shapes they may.

    The exception is float32 "tangent" above a head width of 96, which spills some 700 bytes with any block sizes.
    """
    if jnp.dtype(dtype).itemsize == 4:
        # Full float32 products run on the CUDA cores, and larger tiles spill; so do more warps with narrow heads.
        narrow = {"forward": 32, "dkv": 32 if masked else 64}.get(kernel, 0)
        return Blocks(16, 16, 4 if width <= narrow else 8, 2)
    bucket = next(w for w in (64, 96, 128, 256) if width <= w)
    capability = backend.target().capability
    if capability is not None and capability < 9.0:
        return (_AMPERE_MASKED if masked else {}).get((kernel, bucket), _AMPERE[kernel, bucket])
    if kernel == "dkv" and masked and 64 < width <= 128:
        return _DKV_MASKED
    return _HOPPER[kernel, bucket]


def candidates(default: Blocks, *, kernel: str, dtype: str, width: int, mask: str, size: int) -> Iterator[Blocks]:
    """The search space of `tune`: 64 or 128 rows per program, 16 or 32 rows per warp, and the tiles it loops over."""
    del default, width, mask, size
    if dtype == "float32":
        return
    for own, walked, num_stages in itertools.product((64, 128), (32, 64, 128), (2, 3, 4)):
        for num_warps in (4, 8) if own == 128 else (4,):
            block_q, block_k = (walked, own) if kernel == "dkv" else (own, walked)
            yield Blocks(block_q, block_k, num_warps, num_stages)


CANDIDATES = {NAMES[kernel]: functools.partial(candidates, kernel=kernel) for kernel in ("forward", "dq", "dkv")}
TANGENT_CANDIDATES = {NAMES["tangent"]: functools.partial(candidates, kernel="tangent")}

_HOPPER = {
    ("forward", 64): Blocks(64, 128, 4, 3),
    ("forward", 96): Blocks(128, 64, 8, 3),
    ("forward", 128): Blocks(128, 128, 8, 3),
    ("forward", 256): Blocks(128, 32, 8, 3),
    ("dq", 64): Blocks(64, 64, 4, 3),
    ("dq", 96): Blocks(64, 64, 4, 3),
    ("dq", 128): Blocks(64, 64, 4, 3),
    ("dq", 256): Blocks(64, 32, 8, 2),
    ("dkv", 64): Blocks(64, 64, 4, 3),
    ("dkv", 96): Blocks(64, 64, 4, 3),
    ("dkv", 128): Blocks(64, 64, 4, 2),
    ("dkv", 256): Blocks(16, 64, 8, 2),
    ("tangent", 64): Blocks(128, 64, 8, 2),
    ("tangent", 96): Blocks(128, 64, 8, 2),
    ("tangent", 128): Blocks(128, 64, 8, 2),
    ("tangent", 256): Blocks(64, 32, 4, 2),
}
_DKV_MASKED = Blocks(32, 128, 8, 3)  # a second loop for masked tiles takes more registers
_AMPERE = {  # 163 KiB of shared memory (Hopper: 227), and both operands of a product are in registers
    ("forward", 64): Blocks(128, 64, 8, 2),
    ("forward", 96): Blocks(128, 64, 8, 2),
    ("forward", 128): Blocks(128, 64, 8, 2),
    ("forward", 256): Blocks(64, 32, 8, 2),
    ("dq", 64): Blocks(128, 32, 8, 2),
    ("dq", 96): Blocks(128, 32, 8, 2),
    ("dq", 128): Blocks(128, 32, 8, 2),
    ("dq", 256): Blocks(64, 32, 8, 2),
    ("dkv", 64): Blocks(32, 128, 8, 2),
    ("dkv", 96): Blocks(32, 64, 8, 2),
    ("dkv", 128): Blocks(64, 64, 8, 2),
    ("dkv", 256): Blocks(64, 32, 8, 2),
    ("tangent", 64): Blocks(128, 32, 8, 2),
    ("tangent", 96): Blocks(128, 32, 8, 2),
    ("tangent", 128): Blocks(128, 32, 8, 2),
    ("tangent", 256): Blocks(64, 32, 8, 2),
}
_AMPERE_MASKED = {("dkv", 128): Blocks(32, 64, 8, 2), ("tangent", 96): Blocks(64, 32, 4, 2)}
