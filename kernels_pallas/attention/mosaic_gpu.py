"""Attention on Hopper with Pallas-Mosaic-GPU."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import backend
from . import tiles
from .mask import AttentionMask


LOG2_E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)
WIDTHS = (64, 72, 80, 96, 128, 256)
DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one kernel cuts its work."""

    block_q: int
    block_k: int
    stages: int
    consumers: int = 2


def blocks_for(kernel: str, width: int, masked: bool) -> Blocks:
    return _BLOCKS[kernel, next(w for w in (64, 96, 128, 256) if width <= w)]


_BLOCKS = {
    ("forward", 64): Blocks(64, 128, 2),
    ("forward", 96): Blocks(64, 128, 2),
    ("forward", 128): Blocks(64, 128, 2),
    ("forward", 256): Blocks(64, 64, 2),
}


def forward(q, k, v, mask, sinks, *, scale, softcap, return_lse):
    B, T, N, H = q.shape
    blocks = blocks_for("forward", H, mask is not None)
    tile_q = blocks.block_q * blocks.consumers
    width = pl.cdiv(H, 16) * 16
    padded = [_pad(x, width) for x in (q, k, v)]
    mask, lists = _key_lists(mask, q, k, tile_q, blocks.block_k)
    rows = pl.cdiv(T, tile_q) * tile_q
    operand = functools.partial(_operand, width=width, dtype=q.dtype)
    out, lse = _run(
        functools.partial(_forward_kernel, scores=Scores.of(q, scale, softcap), blocks=blocks),
        *(*padded, mask, lists, None if sinks is None else sinks.astype(jnp.float32)),
        name="flash_attention_forward",
        programs=rows // tile_q * N * B,
        threads=blocks.consumers + 1,
        out_type=[
            jax.ShapeDtypeStruct(padded[0].shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, rows), jnp.float32),
        ],
        scratch=[
            operand(blocks.consumers, blocks.block_q),
            operand(blocks.stages, blocks.block_k),
            operand(blocks.stages, blocks.block_k),
            plgpu.SMEM((blocks.consumers, blocks.block_q), jnp.float32),
            plgpu.Barrier(num_barriers=blocks.consumers),
            plgpu.Barrier(num_barriers=blocks.stages),
            plgpu.Barrier(num_barriers=blocks.stages),
            plgpu.Barrier(num_barriers=blocks.stages, num_arrivals=blocks.consumers),
            plgpu.Barrier(num_barriers=blocks.stages, num_arrivals=blocks.consumers),
            plgpu.Barrier(num_arrivals=blocks.consumers),
        ],
    )
    out = out[:, :T, :, :H]
    residuals = (q, k, v, mask, sinks, out, lse)
    return (out, _natural(lse, T)) if return_lse else out, residuals


def _operand(count, rows, *, width, dtype):
    swizzle = plgpu.find_swizzle(16 * width)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM((count, rows, width), dtype, transforms=transforms)


def _natural(lse, T):
    lse = lse[:, :, :T]
    return jnp.swapaxes(jnp.where(lse == LOWEST, -jnp.inf, lse / LOG2_E), 1, 2)


def _pad(x, width):
    _, length, _, H = x.shape
    return jnp.pad(x, ((0, 0), (0, -length % 8), (0, 0), (0, width - H)))


def _key_lists(mask, q, k, tile_q, block_k):
    T, S = q.shape[1], k.shape[1]
    if mask is None and S % block_k == 0:
        return None, None
    mask = AttentionMask.full(T, S) if mask is None else mask
    lists = tiles.key_tiles(mask, tile_q, block_k)
    to = lambda x, block: None if x is None else jnp.pad(jnp.asarray(x), ((0, 0), (0, -x.shape[1] % block)))
    mask = dataclasses.replace(
        mask,
        start=to(mask.start, tile_q),
        end=to(mask.end, tile_q),
        q_private=to(mask.q_private, tile_q),
        k_private=to(mask.k_private, block_k),
    )
    return mask, lists


def _run(kernel, *arrays, name, programs, threads, out_type, scratch):
    flat, tree = jax.tree.flatten(arrays)

    def body(*refs):
        kernel(*jax.tree.unflatten(tree, refs[: len(flat)]), *refs[len(flat) :])

    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=threads,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if backend.interpret() else None,
    )(*flat)


@dataclasses.dataclass(frozen=True)
class Scores:
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, q, scale: float | None, softcap: float | None) -> "Scores":
        return cls(q.shape[-1] ** -0.5 if scale is None else scale, softcap)

    def __call__(self, products):
        if self.softcap is None:
            return products * (self.scale * LOG2_E), None
        tanh = jnp.tanh(products * (self.scale / self.softcap))
        return tanh * (self.softcap * LOG2_E), tanh

    def through(self, d_scores, tanh):
        return d_scores if tanh is None else d_scores * (1 - tanh * tanh)


ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def _forward_kernel(
    q_ref, k_ref, v_ref, mask, lists, sinks_ref, out_ref, lse_ref,
    q_smem, k_smem, v_smem, lse_smem, q_ready, k_ready, v_ready, k_free, v_free, turn,
    *, scores, blocks,
):  # fmt: skip
    block_q, block_k = blocks.block_q, blocks.block_k
    batch, head, tile = _program(q_ref, block_q * blocks.consumers)
    kv_head = lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))
    me = lax.axis_index("warpgroup")
    walk = _Walk.of(lists, batch, tile, k_ref.shape[1] // block_k)

    @pl.when(me == blocks.consumers)
    def _produce():
        plgpu.set_max_registers(24, action="decrease")

        @pl.loop(0, walk.seen)
        def _(i):
            slot = lax.rem(i, jnp.int32(blocks.stages))
            rows = (batch, pl.ds(walk.nth(i) * block_k, block_k), kv_head)
            for ref, smem, ready, free in ((k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)):

                @pl.when(i >= blocks.stages)
                def _wait(free=free):
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(ref.at[rows], smem.at[slot], ready.at[slot])

    @pl.when(me < blocks.consumers)
    def _consume():
        plgpu.set_max_registers(240, action="increase")
        start_q = (tile * blocks.consumers + me) * block_q
        rows = (batch, pl.ds(start_q, block_q), head)
        plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem.at[me], q_ready.at[me])
        seen_by = _seen_by_queries(mask, batch, start_q, block_q)
        plgpu.barrier_wait(q_ready.at[me])

        def rendezvous():
            if blocks.consumers > 1:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        def step(i, carry, *, masked):
            acc, top, total = carry
            slot = lax.rem(i, jnp.int32(blocks.stages))
            plgpu.barrier_wait(k_ready.at[slot])

            def product(acc_ref):
                plgpu.wgmma(acc_ref, q_smem.at[me], k_smem.at[slot].transpose((1, 0)))
                rendezvous()
                return acc_ref[...]

            score, _ = scores(pl.run_scoped(product, plgpu.ACC((block_q, block_k), jnp.float32)))
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                score = jnp.where(seen_by(walk.nth(i) * block_k, block_k), score, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(score, axis=1))
            decay = jnp.exp2(top - new_top)
            weights = jnp.exp2(score - _across(new_top, score))
            total = total * decay + jnp.sum(weights, axis=1)
            acc = acc * _across(decay, acc)
            narrow = weights.astype(v_ref.dtype)
            acc, total, narrow = lax.optimization_barrier((acc, total, narrow))
            if blocks.consumers > 1:
                plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            if blocks.consumers > 1:
                plgpu.barrier_wait(turn)

            def accumulate(acc_ref):
                plgpu.wgmma(acc_ref, narrow, v_smem.at[slot])

            acc = pl.run_state(accumulate)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, new_top, total

        row = lambda value: plgpu.layout_cast(jnp.full((block_q,), value, jnp.float32), ROWS)
        if sinks_ref is None:
            top, total = row(LOWEST), row(0.0)
        else:
            top, total = row(sinks_ref[head] * LOG2_E), row(1.0)
        acc = plgpu.layout_cast(jnp.zeros((block_q, q_smem.shape[2]), jnp.float32), plgpu.Layout.WGMMA)
        pl.when(me == 1)(rendezvous)
        carry = lax.fori_loop(0, walk.whole, functools.partial(step, masked=False), (acc, top, total))
        if mask is not None:
            carry = lax.fori_loop(walk.whole, walk.seen, functools.partial(step, masked=True), carry)
        acc, top, total = carry
        pl.when(me == 0)(rendezvous)
        total = jnp.where(total == 0.0, 1.0, total)
        q_smem.at[me][...] = (acc * _across(1.0 / total, acc)).astype(out_ref.dtype)
        lse_smem.at[me][...] = top + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[me], out_ref.at[rows])
        plgpu.copy_smem_to_gmem(lse_smem.at[me], lse_ref.at[batch, head, pl.ds(start_q, block_q)])
        plgpu.wait_smem_to_gmem(0)


def _across(row, like):
    return lax.broadcast_in_dim(row, like.shape, [0])


def _program(ref, block):
    _, length, heads, _ = ref.shape
    program = lax.axis_index("program")
    count, heads = jnp.int32(pl.cdiv(length, block)), jnp.int32(heads)
    rest = lax.div(program, count)
    return lax.div(rest, heads), lax.rem(rest, heads), lax.rem(program, count)


@dataclasses.dataclass(frozen=True)
class _Walk:
    nth: object
    whole: object
    seen: object

    @classmethod
    def of(cls, lists, batch, row, count):
        if lists is None:
            return cls(lambda i: i, count, count)
        example = _example(lists.whole, batch)
        return cls(lambda i: lists.order[example, row, i], lists.whole[example, row], lists.seen[example, row])


def _example(ref, batch):
    return jnp.int32(0) if ref.shape[0] == 1 else batch


def _seen_by_queries(mask, batch, start_q, block_q):
    if mask is None:
        return None
    example = _example(mask.start, batch)
    load = lambda ref, start, size, layout: plgpu.load(
        ref.at[example, pl.ds(start, size)], layout=layout, optimized=False
    )
    start, end = (load(ref, start_q, block_q, ROWS) for ref in (mask.start, mask.end))
    private = None if mask.q_private is None else load(mask.q_private, start_q, block_q, ROWS)

    def seen(start_k, block_k):
        shape = (block_q, block_k)
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + start_k
        of_queries = lambda x: lax.broadcast_in_dim(x, shape, [0])
        sees = (of_queries(start) <= key) & (key < of_queries(end))
        if private is None:
            return sees
        k_private = lax.broadcast_in_dim(load(mask.k_private, start_k, block_k, COLUMNS), shape, [1])
        return sees & ((k_private == 0) | (k_private == of_queries(private)))

    return seen
