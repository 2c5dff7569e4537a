"""Flash attention for Hopper in Pallas-Mosaic-GPU: warp-specialised, with TMA copies and wgmma products.

One producer warpgroup copies tiles into a ring buffer of slots in shared memory; two consumer warpgroups multiply them.
In the forward each consumer has its own 64 queries. The consumers alternate (ping-pong scheduling): one multiplies
while the other computes exponentials. The softmax weights stay in registers as the operand of the second product. As
in the Triton kernels, every output is written once, by one program, in a fixed order, without atomics; hidden tiles are
skipped, and fully visible tiles are not masked (tiles.py).

Scores are in base 2 (multiplied by log2(e)), because GPUs have an instruction for exp2 and none for exp. log-sum-exps
are float32 (B, N, rows), in base 2, LOWEST for a query without visible keys; rows is T rounded up to whole tiles.

wgmma multiplies 16 columns of bfloat16 at a time, and TMA copies swizzled blocks of 8 rows. So XLA pads a head of width
72 to 80 (not to 128), and an odd length to a multiple of 8, before the kernel. Other widths and lengths are read in
place.

What is verified without a GPU: the arithmetic and the synchronisation of the copies, by JAX's interpreter and its race
detector, at small sizes (JAX 0.11 cannot interpret products with a left operand in registers; the tests add that); and
the machine code for sm_90a at every width, with and without a mask, which spills no registers except with a soft cap.
The interpreter runs products synchronously, while they are asynchronous on the GPU. So no test on a CPU shows that each
product is awaited before its operands are overwritten.

Source: FlashAttention-3, https://arxiv.org/abs/2407.08608, section 3.1 and algorithm 1 (without its overlap inside a
warpgroup); backward, FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 2.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import backend
from ..pallas.mosaic_gpu import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    Stream,
    fill,
    free,
    operand,
    ready,
    round_up,
    run_kernel,
    slot_of,
)
from . import tiles
from .blocks import measured
from .mask import AttentionMask, row_of
from .scores import LOG2_E, LOWEST, Scores, natural


WIDTHS = (64, 72, 80, 96, 128, 256)
DTYPES = ("bfloat16", "float16")
ROWS = plgpu.Layout.WGMMA.reduce(1)  # the register layout of one number per row of a wgmma tile; COLUMNS: per column
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of one kernel, multiples of 64. A program's own tile has such a block for each consumer."""

    block_q: int
    block_k: int
    stages: int  # slots of the ring buffer
    overlap: bool = True  # backward: whether the second product overlaps with the exponentials of the first


NAMES = {
    "forward": "flash_attention_forward.mosaic_gpu",
    "dq": "flash_attention_backward_dq.mosaic_gpu",
    "dkv": "flash_attention_backward_dkv.mosaic_gpu",
}


def blocks_for(kernel: str, q, k, mask) -> Blocks:
    """The block sizes of one of NAMES. A tuned entry is looked up by the length that a program loops over."""
    default = untuned(kernel, q.shape[-1], mask is not None)
    return measured(NAMES[kernel], default, q, mask, walked=q if kernel == "dkv" else k)


def candidates(default: Blocks, *, kernel: str, dtype: str, width: int, mask: str, size: int) -> Iterator[Blocks]:
    """The search space of `tune`: the tiles a program loops over, the slots, and overlap or none in the backward."""
    del default, dtype, width, mask, size
    for walked, stages, overlap in itertools.product((64, 128), (1, 2, 3, 4), (True, False)):
        if overlap or kernel != "forward":
            block_q, block_k = (walked, 64) if kernel == "dkv" else (64, walked)
            yield Blocks(block_q, block_k, stages, overlap)


CANDIDATES = {name: functools.partial(candidates, kernel=kernel) for kernel, name in NAMES.items()}


def untuned(kernel: str, width: int, masked: bool) -> Blocks:
    """The default block sizes: without a soft cap none spills, and all fit in shared memory."""
    if kernel == "dq" and masked and 64 < width <= 96:
        return _DQ_MASKED  # a second loop for masked tiles takes more registers
    return _BLOCKS[kernel, next(w for w in (64, 96, 128, 256) if width <= w)]


_BLOCKS = {
    ("forward", 64): Blocks(64, 128, 4),
    ("forward", 96): Blocks(64, 128, 3),
    ("forward", 128): Blocks(64, 128, 2),
    ("forward", 256): Blocks(64, 64, 2),
    ("dq", 64): Blocks(64, 128, 3),
    ("dq", 96): Blocks(64, 128, 2),
    ("dq", 128): Blocks(64, 64, 3),
    ("dq", 256): Blocks(64, 64, 1, overlap=False),
    ("dkv", 64): Blocks(64, 64, 4),
    ("dkv", 96): Blocks(64, 64, 3),
    ("dkv", 128): Blocks(64, 64, 3, overlap=False),
    ("dkv", 256): Blocks(64, 64, 2),
}
_DQ_MASKED = Blocks(64, 64, 3)


def unsupported(q, k, v, mask, sinks, *, scale, softcap, return_lse) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del mask, sinks, softcap, return_lse
    device = backend.target()
    if not backend.interpret() and (device.platform != "gpu" or device.capability != 9.0):
        return f"needs a Hopper GPU (compute capability 9.0), got {device.kind}"
    if q.dtype.name not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"needs one dtype among {', '.join(DTYPES)}, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] not in WIDTHS:
        return f"needs a head width among {', '.join(map(str, WIDTHS))}, got {q.shape[-1]}"
    return None


def forward(q, k, v, mask, sinks, *, scale, softcap, return_lse):
    """The output, and (q, k, v, mask, sinks, out, lse) for `backward`."""
    B, T, N, H = q.shape
    blocks = blocks_for("forward", q, k, mask)
    tile_q = CONSUMERS * blocks.block_q
    rows = round_up(T, tile_q)
    arrays = [whole_rows(x) for x in (q, k, v)]
    walked = tile_lists(tiles.key_tiles, mask, q, k, tile_q, blocks.block_k, only_keys=True)
    own, slots = operand(CONSUMERS, blocks.block_q, q), operand(blocks.stages, blocks.block_k, q)
    out, lse = run_kernel(
        functools.partial(_forward_kernel, scores=Scores.of(q, scale, softcap), blocks=blocks),
        *(*arrays, *walked, None if sinks is None else sinks.astype(jnp.float32)),
        name="flash_attention_forward",
        programs=B * N * rows // tile_q,
        out_type=[like_of(arrays[0]), jax.ShapeDtypeStruct((B, N, rows), jnp.float32)],
        scratch=[
            *(own, slots, slots, plgpu.SMEM((CONSUMERS, blocks.block_q), jnp.float32)),
            plgpu.Barrier(num_barriers=CONSUMERS),
            *(ready(blocks), ready(blocks), free(blocks), free(blocks)),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
    )
    out = out[:, :T, :, :H]
    residuals = (q, k, v, mask, sinks, out, lse)
    return (out, natural(lse[:, :, :T])) if return_lse else out, residuals


def to_blocks(x, block: int):
    """Pads the last dimension with zeros to whole blocks: TMA needs rows of whole 16 bytes, and these loads are not
    masked."""
    return jnp.pad(jnp.asarray(x), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])


def whole_rows(x):
    """Pads T of (B, T, N, H) to a multiple of 8 and H to one of 16, for TMA and wgmma; x itself if they are."""
    rows, columns = -x.shape[1] % 8, -x.shape[3] % 16
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns))) if rows or columns else x


def like_of(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def tile_lists(lists: Callable, mask, q, k, tile_q: int, tile_k: int, *, only_keys: bool):
    """The mask, padded to whole tiles, and its tile lists; (None, None) if every tile is fully visible.

    `only_keys`: the kernel loops over keys, so keys past the end must be masked. Queries past the end need no mask:
    they are zero and add zero.
    """
    T, S = q.shape[1], k.shape[1]
    if mask is None and not (only_keys and S % tile_k):
        return None, None
    mask = AttentionMask.full(T, S) if mask is None else mask
    private = mask.k_private is not None
    whole = dataclasses.replace(
        mask,
        start=to_blocks(mask.start, tile_q),
        end=to_blocks(mask.end, tile_q),
        q_private=to_blocks(mask.q_private, tile_q) if private else None,
        k_private=to_blocks(mask.k_private, tile_k) if private else None,
    )
    return whole, lists(mask, tile_q, tile_k)


def _forward_kernel(
    q_ref, k_ref, v_ref, mask, lists, sinks_ref, out_ref, lse_ref,
    q_smem, k_smem, v_smem, lse_smem, q_ready, k_ready, v_ready, k_free, v_free, turn,
    *, scores, blocks,
):  # fmt: skip
    """Online softmax over the key tiles: FlashAttention-3, algorithm 1, with ping-pong scheduling (section 3.1)."""
    block_q, block_k = blocks.block_q, blocks.block_k
    batch, head, tile = program_of(q_ref, CONSUMERS * block_q)
    kv_head = lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))
    walk = Walk.of(lists, batch, tile, pl.cdiv(k_ref.shape[1], block_k))
    me = lax.axis_index("warpgroup")

    @pl.when(me == CONSUMERS)
    def _produce():
        keys = lambda ref: lambda i: ref.at[batch, pl.ds(walk.place(i)[1] * block_k, block_k), kv_head]
        fill(walk, blocks, Stream(k_ready, k_free, [(keys(k_ref), k_smem)]),
              Stream(v_ready, v_free, [(keys(v_ref), v_smem)]))  # fmt: skip

    @pl.when(me < CONSUMERS)
    def _consumer_kernel():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        start_q = (tile * CONSUMERS + me) * block_q
        mine = (batch, pl.ds(start_q, block_q), head)
        plgpu.copy_gmem_to_smem(q_ref.at[mine], q_smem.at[me], q_ready.at[me])
        seen = Seen(mask, batch).by_rows(start_q, block_q)
        plgpu.barrier_wait(q_ready.at[me])

        def change_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def step(i, carry, *, masked):
            acc, top, total = carry
            slot = slot_of(i, blocks)
            plgpu.barrier_wait(k_ready.at[slot])

            def product(score_ref):
                plgpu.wgmma(score_ref, q_smem.at[me], k_smem.at[slot].transpose((1, 0)))
                change_turns()
                return score_ref[...]

            score, _ = scores(pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((block_q, block_k), jnp.float32)))
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                score = jnp.where(seen(walk.place(i)[1] * block_k, block_k), score, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(score, axis=1))
            decay = jnp.exp2(top - new_top)
            weights = jnp.exp2(score - down(new_top, score.shape))
            total = total * decay + jnp.sum(weights, axis=1)
            acc = acc * down(decay, acc.shape)
            # Without this barrier the compiler would move this work past the hand-over to the other consumer.
            acc, total, narrow = lax.optimization_barrier((acc, total, weights.astype(v_ref.dtype)))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)
            acc = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, narrow, v_smem.at[slot]))(
                plgpu.WGMMAAccumulatorRef.init(acc)
            )
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, new_top, total

        # A sink is a key with this score and no value: the sum starts with it.
        first, one = (LOWEST, 0.0) if sinks_ref is None else (sinks_ref[head] * LOG2_E, 1.0)
        row = lambda x: plgpu.layout_cast(jnp.full((block_q,), x, jnp.float32), ROWS)
        pl.when(me == 1)(change_turns)  # the second consumer starts half a step later
        acc, top, total = walk.run(step, (zeros(q_smem), row(first), row(one)))
        pl.when(me == 0)(change_turns)
        total = jnp.where(total == 0.0, 1.0, total)  # a query without visible keys has output 0
        q_smem.at[me][...] = (acc * down(1.0 / total, acc.shape)).astype(out_ref.dtype)
        lse_smem.at[me][...] = top + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[me], out_ref.at[mine])
        plgpu.copy_smem_to_gmem(lse_smem.at[me], lse_ref.at[batch, head, pl.ds(start_q, block_q)])
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class Walk:
    """The tiles a program loops over, for each of `group` heads: first fully visible, then partially visible ones."""

    order: Callable
    whole: Any
    seen: Any
    group: int

    @classmethod
    def of(cls, lists, batch, row, count: int, group: int = 1) -> "Walk":
        if lists is None:
            every = jnp.int32(count)
            return cls(lambda i: i, every, every, group)
        example = row_of(lists.whole, batch)
        order = lambda i: lists.order[example, row, i]
        return cls(order, lists.whole[example, row], lists.seen[example, row], group)

    @property
    def steps(self):
        return self.group * self.seen

    def place(self, i):
        """(head in the group, tile) of a step."""
        if self.group == 1:
            return 0, self.order(i)
        first = i < self.group * self.whole
        span = jnp.where(first, self.whole, self.seen - self.whole)
        i = jnp.where(first, i, i - self.group * self.whole)
        return lax.div(i, span), self.order(jnp.where(first, 0, self.whole) + lax.rem(i, span))

    def run(self, step: Callable, carry):
        """`step(i, carry, masked=...)` over all steps."""
        whole = self.group * self.whole
        carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), carry)
        if self.seen is self.whole:
            return carry
        return lax.fori_loop(whole, self.steps, functools.partial(step, masked=True), carry)


@dataclasses.dataclass(frozen=True)
class Seen:
    """Masking of a tile: loads the mask of the program's own side once, that of the other side for each tile."""

    mask: Any
    batch: Any

    def _vector(self, ref, start, size: int, layout):
        return load(ref.at[row_of(ref, self.batch), pl.ds(start, size)], layout)

    def by_rows(self, start_q, block_q: int) -> Any:
        """(start_k, block_k) -> bool (block_q, block_k)."""
        if self.mask is None:
            return None
        queries = [self._vector(ref, start_q, block_q, ROWS) for ref in self._of_queries()]

        def seen(start_k, block_k):
            shape = (block_q, block_k)
            keys = lambda ref: along(self._vector(ref, start_k, block_k, COLUMNS), shape)
            return self._scores([down(x, shape) for x in queries], keys, _positions(shape, 1, start_k))

        return seen

    def by_columns(self, start_k, block_k: int) -> Any:
        """(start_q, block_q) -> bool (block_k, block_q)."""
        if self.mask is None:
            return None
        private = self.mask.k_private
        own = None if private is None else self._vector(private, start_k, block_k, ROWS)

        def seen(start_q, block_q):
            shape = (block_k, block_q)
            queries = [along(self._vector(ref, start_q, block_q, COLUMNS), shape) for ref in self._of_queries()]
            return self._scores(queries, lambda _: down(own, shape), _positions(shape, 0, start_k))

        return seen

    def _of_queries(self):
        return [x for x in (self.mask.start, self.mask.end, self.mask.q_private) if x is not None]

    def _scores(self, queries, keys: Callable, position):
        start, end, *private = queries
        seen = (start <= position) & (position < end)
        if not private:
            return seen
        k_private = keys(self.mask.k_private)
        return seen & ((k_private == 0) | (k_private == private[0]))


def program_of(ref, block: int):
    """(batch index, head, tile index) of this program; consecutive programs have the tiles of one head."""
    _, length, heads, _ = ref.shape
    program, count = lax.axis_index("program"), jnp.int32(pl.cdiv(length, block))
    rest = lax.div(program, count)
    return lax.div(rest, jnp.int32(heads)), lax.rem(rest, jnp.int32(heads)), lax.rem(program, count)


def load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def down(row, shape):
    """Broadcasts one number per row to all columns of a tile."""
    return lax.broadcast_in_dim(row, shape, [0])


def along(column, shape):
    """Broadcasts one number per column to all rows of a tile."""
    return lax.broadcast_in_dim(column, shape, [1])


def _positions(shape, axis: int, start):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) + start


def zeros(smem):
    """An accumulator of zeros for the rows of one tile."""
    return plgpu.layout_cast(jnp.zeros(smem.shape[1:], jnp.float32), plgpu.Layout.WGMMA)
