"""Shared code of the Pallas-Mosaic-GPU kernels: warp-specialised pipelines with TMA copies and wgmma products.

One warpgroup, the producer, copies tiles by TMA into a ring buffer of slots in shared memory; the consumer warpgroups
multiply them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import backend


CONSUMERS = 2  # consumer warpgroups
ROWS = 64  # rows of a consumer: the M of wgmma
DEPTH = 64  # contraction size per step: 128 bytes of 16-bit numbers, one swizzle
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # per thread; 128 (24 + 2 * 240) is within an SM's 65,536


def round_up(n: int, multiple: int) -> int:
    return pl.cdiv(n, multiple) * multiple


def operand(count: int, rows: int, like):
    """Shared memory for `count` tiles in the layout that wgmma reads: blocks of 8 rows, swizzled."""
    width = round_up(like.shape[-1], 16)
    swizzle = plgpu.find_swizzle(16 * width)
    tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
    swizzling = plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM((count, rows, width), like.dtype, transforms=(tiling, swizzling))


def ready(blocks, copies: int = 1):
    """One barrier per slot: its copies have arrived."""
    return plgpu.Barrier(num_barriers=blocks.stages, num_arrivals=copies)


def free(blocks):
    """One barrier per slot: every consumer has finished with it."""
    return plgpu.Barrier(num_barriers=blocks.stages, num_arrivals=CONSUMERS)


def run_kernel(kernel, *arrays, name, programs, out_type, scratch):
    """Launches a warp-specialised kernel of CONSUMERS + 1 warpgroups.

    The grid has one dimension, because the other dimensions are limited to 65,535 and are left to vmap. Mosaic GPU
    takes no cost estimate.
    """
    leaves, tree = jax.tree.flatten(arrays)

    def body(*refs):
        kernel(*jax.tree.unflatten(tree, refs[: len(leaves)]), *refs[len(leaves) :])

    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if backend.interpret() else None,
    )(*leaves)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Copies that share a barrier: pairs of (step -> source in global memory, slots in shared memory)."""

    ready: Any
    free: Any
    copies: list[tuple[Callable, Any]]


def fill(walk, blocks, *streams: Stream) -> None:
    """The producer: fills the ring buffer, then waits until the last slots are free, which the interpreter requires."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

    @pl.loop(0, walk.steps + blocks.stages)
    def _(i):
        slot = slot_of(i, blocks)
        for stream in streams:
            pl.when(i >= blocks.stages)(functools.partial(plgpu.barrier_wait, stream.free.at[slot]))

            @pl.when(i < walk.steps)
            def _copy(stream=stream):
                for source, smem in stream.copies:
                    plgpu.copy_gmem_to_smem(source(i), smem.at[slot], stream.ready.at[slot])


def multiply(walk, x_smem, matrices, ready, free, me, accs, blocks) -> None:
    """A consumer: acc += x matrix for each accumulator. A slot is freed after the next slot's product has started."""

    @pl.loop(0, walk.steps)
    def _(i):
        slot = slot_of(i, blocks)
        plgpu.barrier_wait(ready.at[slot])
        x = x_smem.at[slot, pl.ds(me * ROWS, ROWS)]
        for acc, matrix in zip(accs, matrices, strict=True):
            plgpu.wgmma(acc, x, matrix(slot))
        plgpu.wgmma_wait(len(accs))

        @pl.when(i > 0)
        def _free():
            plgpu.barrier_arrive(free.at[slot_of(i - 1, blocks)])

    plgpu.wgmma_wait(0)

    @pl.when(walk.steps > 0)
    def _free_last():
        plgpu.barrier_arrive(free.at[slot_of(walk.steps - 1, blocks)])


def pinned(index):
    """The index behind an optimisation barrier: else the compiler hoists what depends on it, and spills registers."""
    return lax.optimization_barrier(index)


def slot_of(i, blocks):
    return pinned(lax.rem(i, jnp.int32(blocks.stages)))
