"""Backward of flash attention for Hopper in Pallas-Mosaic-GPU: a d_q kernel and a d_k/d_v kernel, warp-specialised.

The d_q kernel loops over the key tiles of each query tile. The d_k/d_v kernel loops over the query tiles of each key
tile, for all query heads of the key/value head. Both recompute the softmax weights from the log-sum-exp. There are no
atomics, so results are bit-reproducible. mosaic_gpu.py describes the warpgroups and what is verified without a GPU.

Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 2; warp specialisation, FlashAttention-3,
https://arxiv.org/abs/2407.08608, section 3.1.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..pallas.mosaic_gpu import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    Stream,
    fill,
    free,
    operand,
    pinned,
    ready,
    round_up,
    run_kernel,
    slot_of,
)
from . import tiles
from .mosaic_gpu import (
    COLUMNS,
    ROWS,
    Seen,
    Walk,
    along,
    blocks_for,
    down,
    like_of,
    load,
    program_of,
    tile_lists,
    to_blocks,
    whole_rows,
    zeros,
)
from .scores import Scores, d_sinks, weights_of


def backward(residuals, d_out, *, scale, softcap, return_lse):
    """d_q, d_k, d_v and d_sinks; XLA computes delta = rowsum(out * d_out) - d_lse."""
    q, k, v, mask, sinks, out, lse = residuals
    d_out, d_lse = d_out if return_lse else (d_out, None)
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    delta = jnp.swapaxes(delta if d_lse is None else delta - d_lse, 1, 2)
    lse = lse[:, :, :T]
    arguments = (q, k, v, d_out, mask, lse, delta, Scores.of(q, scale, softcap))
    d_q, (d_k, d_v) = _dq(*arguments), _dkv(*arguments)
    of_sinks = None if sinks is None else d_sinks(sinks, lse, delta)
    return d_q[:, :T, :, :H], d_k[:, :S, :, :H], d_v[:, :S, :, :H], None, of_sinks


def _dq(q, k, v, d_out, mask, lse, delta, scores):
    B, T, N, H = q.shape
    blocks = blocks_for("dq", q, k, mask)
    tile_q = CONSUMERS * blocks.block_q
    arrays = [whole_rows(x) for x in (q, k, v, d_out)]
    own, slots = operand(CONSUMERS, blocks.block_q, q), operand(blocks.stages, blocks.block_k, q)
    [d_q] = run_kernel(
        functools.partial(_dq_kernel, scores=scores, blocks=blocks),
        *(*arrays, *tile_lists(tiles.key_tiles, mask, q, k, tile_q, blocks.block_k, only_keys=True)),
        *(to_blocks(lse, tile_q), to_blocks(delta, tile_q)),
        name="flash_attention_backward_dq",
        programs=B * N * round_up(T, tile_q) // tile_q,
        out_type=[like_of(arrays[0])],
        scratch=[
            *(own, own, slots, slots, plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2)),
            *(ready(blocks), ready(blocks), free(blocks), free(blocks)),
        ],
    )
    return d_q


def _dkv(q, k, v, d_out, mask, lse, delta, scores):
    B, S, K, H = k.shape
    blocks = blocks_for("dkv", q, k, mask)
    owners = 1 if shared_keys(H) else CONSUMERS
    tile_k = owners * blocks.block_k
    arrays = [whole_rows(x) for x in (q, k, v, d_out)]
    own, slots = operand(owners, blocks.block_k, q), operand(blocks.stages, blocks.block_q, q)
    statistic = plgpu.SMEM((blocks.stages, blocks.block_q), jnp.float32)
    return run_kernel(
        functools.partial(_dkv_kernel, scores=scores, blocks=blocks),
        *(*arrays, *tile_lists(tiles.query_tiles, mask, q, k, blocks.block_q, tile_k, only_keys=False)),
        *(to_blocks(lse, blocks.block_q), to_blocks(delta, blocks.block_q)),
        name="flash_attention_backward_dkv",
        programs=B * K * round_up(S, tile_k) // tile_k,
        out_type=[like_of(arrays[1]), like_of(arrays[2])],
        scratch=[
            *(own, own, slots, slots, statistic, statistic),
            plgpu.Barrier(num_barriers=owners, num_arrivals=2),
            *(ready(blocks, 2), ready(blocks, 2), free(blocks), free(blocks)),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
    )


def shared_keys(width: int) -> bool:
    """Whether both consumers of the d_k/d_v kernel have the same keys, one for d_k and the other for d_v.

    Above this width the registers of a consumer hold only one of the two accumulators.
    """
    return width > 128


def _dq_kernel(
    q_ref, k_ref, v_ref, d_out_ref, mask, lists, lse_ref, delta_ref, d_q_ref,
    q_smem, d_out_smem, k_smem, v_smem, own_ready, k_ready, v_ready, k_free, v_free,
    *, scores, blocks,
):  # fmt: skip
    """d_q = scale d_scores k, with d_scores = weights (d_out v^T - delta): FlashAttention-2, algorithm 2."""
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
        plgpu.copy_gmem_to_smem(q_ref.at[mine], q_smem.at[me], own_ready.at[me])
        plgpu.copy_gmem_to_smem(d_out_ref.at[mine], d_out_smem.at[me], own_ready.at[me])
        seen = Seen(mask, batch).by_rows(start_q, block_q)
        lse, delta = (load(ref.at[batch, head, pl.ds(start_q, block_q)], ROWS) for ref in (lse_ref, delta_ref))
        plgpu.barrier_wait(own_ready.at[me])

        def step(i, d_q, *, masked):
            slot, number = slot_of(i, blocks), pinned(me)

            def first(score_ref):
                plgpu.barrier_wait(k_ready.at[slot])
                plgpu.wgmma(score_ref, q_smem.at[number], k_smem.at[slot].transpose((1, 0)))

            def weigh(products):
                score, tanh = scores(products)
                if masked:
                    score = jnp.where(seen(walk.place(i)[1] * block_k, block_k), score, -jnp.inf)
                return weights_of(score, down(lse, score.shape)), tanh

            def second(d_weights_ref):
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.wgmma(d_weights_ref, d_out_smem.at[number], v_smem.at[slot].transpose((1, 0)))

            weights, tanh, d_weights = two_products((block_q, block_k), first, weigh, second, blocks.overlap)
            plgpu.barrier_arrive(v_free.at[slot])
            d_scores = scores.through(weights * (d_weights - down(delta, weights.shape)), tanh).astype(k_ref.dtype)
            d_q = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, d_scores, k_smem.at[slot]))(
                plgpu.WGMMAAccumulatorRef.init(d_q)
            )
            plgpu.barrier_arrive(k_free.at[slot])
            return d_q

        d_q = walk.run(step, zeros(q_smem))
        number = pinned(me)
        q_smem.at[number][...] = (d_q * scores.scale).astype(d_q_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[number], d_q_ref.at[mine])
        plgpu.wait_smem_to_gmem(0)


def _dkv_kernel(
    q_ref, k_ref, v_ref, d_out_ref, mask, lists, lse_ref, delta_ref, d_k_ref, d_v_ref,
    k_smem, v_smem, q_smem, d_out_smem, lse_smem, delta_smem, own_ready, q_ready, d_out_ready, q_free, d_out_free, done,
    *, scores, blocks,
):  # fmt: skip
    """d_v = weights^T d_out and d_k = scale d_scores^T q, summed over the query heads of this key/value head.

    Scores are transposed, (block_k, block_q), so that the weights are the left operand without a transposition.
    """
    block_q, block_k = blocks.block_q, blocks.block_k
    owners = k_smem.shape[0]
    batch, kv_head, tile = program_of(k_ref, owners * block_k)
    group = q_ref.shape[2] // k_ref.shape[2]
    walk = Walk.of(lists, batch, tile, pl.cdiv(q_ref.shape[1], block_q), group)
    me = lax.axis_index("warpgroup")

    @pl.when(me == CONSUMERS)
    def _produce():
        def queries(ref, i):
            member, nth = walk.place(i)
            rows, head = pl.ds(nth * block_q, block_q), kv_head * group + member
            return ref.at[batch, rows, head] if ref is q_ref or ref is d_out_ref else ref.at[batch, head, rows]

        of = lambda ref: functools.partial(queries, ref)
        fill(walk, blocks, Stream(q_ready, q_free, [(of(q_ref), q_smem), (of(lse_ref), lse_smem)]),
              Stream(d_out_ready, d_out_free, [(of(d_out_ref), d_out_smem), (of(delta_ref), delta_smem)]))  # fmt: skip

    def consumer_kernel(number, wanted):
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        start_k = (tile * owners + number) * block_k
        mine, k, v = (batch, pl.ds(start_k, block_k), kv_head), k_smem.at[number], v_smem.at[number]

        @pl.when(me == number)
        def _load_own():
            plgpu.copy_gmem_to_smem(k_ref.at[mine], k, own_ready.at[number])
            plgpu.copy_gmem_to_smem(v_ref.at[mine], v, own_ready.at[number])

        seen = Seen(mask, batch).by_columns(start_k, block_k)
        plgpu.barrier_wait(own_ready.at[number])

        def step(i, carry, *, masked):
            slot, own = slot_of(i, blocks), pinned(jnp.int32(number))

            def first(score_ref):
                plgpu.barrier_wait(q_ready.at[slot])
                plgpu.wgmma(score_ref, k_smem.at[own], q_smem.at[slot].transpose((1, 0)))

            def weigh(products):
                score, tanh = scores(products)
                if masked:
                    score = jnp.where(seen(walk.place(i)[1] * block_q, block_q), score, -jnp.inf)
                return weights_of(score, along(load(lse_smem.at[slot], COLUMNS), score.shape)), tanh

            def second(d_weights_ref):
                plgpu.barrier_wait(d_out_ready.at[slot])
                plgpu.wgmma(d_weights_ref, v_smem.at[own], d_out_smem.at[slot].transpose((1, 0)))

            shape = (block_k, block_q)
            if "d_k" in wanted:
                weights, tanh, d_weights = two_products(shape, first, weigh, second, blocks.overlap)
                delta = along(load(delta_smem.at[slot], COLUMNS), shape)
                d_scores = scores.through(weights * (d_weights - delta), tanh)
                left = {"d_v": weights, "d_k": d_scores}
            else:
                weights, _ = weigh(product_of(shape, first))
                plgpu.barrier_wait(d_out_ready.at[slot])
                left = {"d_v": weights}
            left = [left[name].astype(q_ref.dtype) for name in wanted]
            plgpu.commit_smem()  # orders the reads of lse and delta before the next copies into their slots

            def accumulate(acc_refs):
                for name, acc_ref, x in zip(wanted, acc_refs, left, strict=True):
                    plgpu.wgmma(acc_ref, x, (q_smem if name == "d_k" else d_out_smem).at[slot])

            carry = pl.run_state(accumulate)(tuple(map(plgpu.WGMMAAccumulatorRef.init, carry)))
            plgpu.barrier_arrive(q_free.at[slot])
            plgpu.barrier_arrive(d_out_free.at[slot])
            return carry

        found = walk.run(step, tuple(zeros(k_smem) for _ in wanted))
        if owners < CONSUMERS:  # until here the other consumer reads k and v
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
        for name, x in zip(wanted, found, strict=True):
            smem, ref, factor = (k, d_k_ref, scores.scale) if name == "d_k" else (v, d_v_ref, 1.0)
            smem[...] = (x * factor).astype(ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, ref.at[mine])
        plgpu.wait_smem_to_gmem(0)

    if owners == CONSUMERS:
        pl.when(me < CONSUMERS)(lambda: consumer_kernel(me, ("d_v", "d_k")))
    else:
        pl.when(me == 0)(lambda: consumer_kernel(0, ("d_v",)))
        pl.when(me == 1)(lambda: consumer_kernel(0, ("d_k",)))


def product_of(shape, issue: Callable):
    """The product that `issue(accumulator)` computes, from an accumulator of zeros."""

    def run(acc_ref):
        issue(acc_ref)
        return acc_ref[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def two_products(shape, first: Callable, use: Callable, second: Callable, overlap: bool):
    """(*use(first), second). With `overlap` the second product runs while `use` does, and needs more registers."""
    if not overlap:
        return *use(product_of(shape, first)), product_of(shape, second)

    def run(first_ref, second_ref):
        first(first_ref)
        second(second_ref)
        used = use(plgpu.wgmma_accumulator_load(first_ref, wait_n=1))
        return *used, second_ref[...]

    acc = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
    return pl.run_scoped(run, acc, acc)
