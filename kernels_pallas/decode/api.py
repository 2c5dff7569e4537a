"""The public functions of decoding, and the tables of what computes them."""

import math

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from ..op import Kernel, Op
from . import cost, reference, triton
from .cases import CASES, PAGED_CASES


SMALLEST_PAGE = 16

DECODE_ATTENTION = Op(
    name="decode_attention",
    reference=reference.decode_attention,
    kernels={"triton": Kernel(triton.forward, reference.decode_attention_backward, triton.unsupported)},
    cost={"forward": cost.forward},
    cases=CASES,
)

PAGED_DECODE_ATTENTION = Op(
    name="paged_decode_attention",
    reference=reference.paged_decode_attention,
    kernels={"triton": Kernel(triton.paged_forward, reference.paged_decode_attention_backward, triton.unsupported)},
    cost={"forward": cost.paged_forward},
    cases=PAGED_CASES,
)


def decode_attention(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K H"],
    lengths: Int[Array, " B"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one query token an example to the keys and values cached before it.

    out = sum_s softmax_s(score[s]) v_cache[s] over s < lengths[b], where score[s] = scale <q, k_cache[s]>, or
    softcap tanh(scale <q, k_cache[s]> / softcap). The softmax is in float32. Query head n reads the keys and values
    of head n // (N / K). An example of length 0 has output 0. What the cache holds past a length is not read, and
    may be anything.

    Args:
      q, k_cache, v_cache: of one dtype; N a multiple of K.
      lengths: how many keys of its cache each example has, from 0 to S; the new token's own among them.
      scale: H**-0.5 where None.
      softcap: bounds the scores; unbounded where None.
      implementation: one of DECODE_ATTENTION's; the best that runs here where None.

    Raises:
      ValueError: the arrays do not fit each other, a length is not in 0, ..., S (which is checked where values are
        known, so not under jit), an option is no such number, or the implementation does not exist.
      NotImplementedError: the implementation named cannot run these arguments here.

    Source: Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
    """
    wrong = _misfit(q, k_cache, v_cache, lengths, paged=False) or _bad_option(scale, softcap)
    if wrong is None and k_cache.shape[0] != q.shape[0]:
        wrong = f"q and k_cache must have one batch B, got q {q.shape} and k_cache {k_cache.shape}"
    wrong = wrong or _bad_length(lengths, k_cache.shape[1], "S")
    if wrong:
        raise ValueError(f"decode_attention: {wrong}.")
    arrays = (q, k_cache, v_cache, jnp.asarray(lengths, jnp.int32))
    return DECODE_ATTENTION(*arrays, scale=scale, softcap=softcap, implementation=implementation)


def paged_decode_attention(
    q: Float[Array, "B N H"],
    k_pages: Float[Array, "P W K H"],
    v_pages: Float[Array, "P W K H"],
    block_table: Int[Array, "B J"],
    lengths: Int[Array, " B"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N H"]:
    """`decode_attention` to a cache in pages of W keys, which lie anywhere and of which an example owns as it grows.

    Keys j W, ..., j W + W - 1 of example b are k_pages[block_table[b, j]], and so the values. Entries of the table
    for which example b has no key, j W >= lengths[b], are not read, and may be anything.

    Args:
      q, k_pages, v_pages: of one dtype; N a multiple of K; W a power of two, 16 at least.
      block_table: the numbers of the pages of each example, in order.
      lengths: how many keys each example has, from 0 to J W; the new token's own among them.
      scale, softcap: as of `decode_attention`.
      implementation: one of PAGED_DECODE_ATTENTION's; the best that runs here where None.

    Raises:
      ValueError: as `decode_attention`; W is no such power, or the table names a page that is not there (where
        values are known).
      NotImplementedError: the implementation named cannot run these arguments here.

    Source: PagedAttention, https://arxiv.org/abs/2309.06180, section 4.1.
    """
    wrong = _misfit(q, k_pages, v_pages, lengths, paged=True) or _bad_option(scale, softcap)
    wrong = wrong or _bad_table(block_table, lengths, k_pages)
    if wrong:
        raise ValueError(f"paged_decode_attention: {wrong}.")
    arrays = (q, k_pages, v_pages, *(jnp.asarray(x, jnp.int32) for x in (block_table, lengths)))
    return PAGED_DECODE_ATTENTION(*arrays, scale=scale, softcap=softcap, implementation=implementation)


def _misfit(q, k, v, lengths, *, paged: bool) -> str | None:
    """Why these are not a query an example and a cache; None where they are."""
    names, layout = ("k_pages and v_pages", "(P, W, K, H)") if paged else ("k_cache and v_cache", "(B, S, K, H)")
    if (q.ndim, k.ndim, v.ndim) != (3, 4, 4):
        return f"want q (B, N, H) and {names} {layout}, got {q.shape}, {k.shape} and {v.shape}; reshape them"
    if k.shape != v.shape:
        return f"{names} must have one shape {layout}, got {k.shape} and {v.shape}"
    if q.shape[2] != k.shape[3]:
        return f"q and {names} must have one head width H, got {q.shape[2]} and {k.shape[3]}"
    if q.shape[1] % k.shape[2]:
        return f"query heads must be a multiple of key heads, got N = {q.shape[1]} and K = {k.shape[2]}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, {names} must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them"
    if lengths.shape != q.shape[:1]:
        return f"lengths must be one number an example, (B,) = {q.shape[:1]}, got {lengths.shape}"
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        return f"lengths must be integers, got {lengths.dtype}; cast them to int32"
    return None


def _bad_option(scale, softcap) -> str | None:
    if scale is not None and not math.isfinite(scale):
        return f"scale must be a finite number, got {scale}"
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        return f"softcap must be a finite number above 0, got {softcap}"
    return None


def _bad_length(lengths, most: int, name: str) -> str | None:
    if (known := _values(lengths)) is None:
        return None
    wrong = np.flatnonzero((known < 0) | (known > most))
    return (
        f"lengths must be from 0 to {name} = {most}, got {known[wrong[0]]} of example {wrong[0]}"
        if len(wrong)
        else None
    )


def _bad_table(block_table, lengths, k_pages) -> str | None:
    P, W = k_pages.shape[:2]
    if W < SMALLEST_PAGE or W.bit_count() != 1:
        return f"k_pages must hold a power of two of keys a page, W >= {SMALLEST_PAGE}, got W = {W}"
    if block_table.ndim != 2 or block_table.shape[0] != lengths.shape[0]:
        return f"block_table must be (B, J), with B = {lengths.shape[0]}, got {block_table.shape}"
    if not jnp.issubdtype(block_table.dtype, jnp.integer):
        return f"block_table must be integers, got {block_table.dtype}; cast it to int32"
    if wrong := _bad_length(lengths, W * block_table.shape[1], "J W"):
        return wrong
    if (table := _values(block_table)) is None or (known := _values(lengths)) is None:
        return None
    needed = np.arange(table.shape[1]) * W < known[:, None]
    wrong = np.argwhere(needed & ((table < 0) | (table >= P)))
    if len(wrong):
        b, j = wrong[0]
        return f"block_table must name pages from 0 to {P - 1} below the lengths, got {table[b, j]} at [{b}, {j}]"
    return None


def _values(array) -> np.ndarray | None:
    """What is in an array, where this process can know: not when tracing, nor in another host's memory."""
    traced = isinstance(array, Tracer)
    return None if traced or not getattr(array, "is_fully_addressable", True) else np.asarray(array)
