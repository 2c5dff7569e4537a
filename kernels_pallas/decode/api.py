"""The public decode-attention functions, for contiguous and paged KV caches, and their implementation tables."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .. import arguments
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
    """Decode attention: one query token per example attends to a contiguous KV cache.

    out = sum_s softmax_s(score[s]) v_cache[s] over s < lengths[b], where score[s] = scale <q, k_cache[s]>, or
    softcap tanh(scale <q, k_cache[s]> / softcap). The softmax is in float32. Query head n uses key/value head
    n // (N / K). An example of length 0 has output 0. The cache past the length of an example is not read and may hold
    any values.

    Args:
      q, k_cache, v_cache: of one dtype; N a multiple of K.
      lengths: the number of keys of each example in its cache, from 0 to S, including the new token's key. Lengths
        that are not known, under jit, are cut to this range.
      scale: H**-0.5 if None.
      softcap: bound of the scores; no bound if None.
      implementation: a name in DECODE_ATTENTION.kernels, or "xla"; if None, the fastest one known that runs here.

    Raises:
      ValueError: the shapes or dtypes do not fit together, a length is outside 0, ..., S (checked if its value is
        known, which it is not under jit), an option is out of range, or there is no such implementation.
      NotImplementedError: the named implementation cannot run these arguments here.

    Source: Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
    """
    name = "decode_attention"
    q, k_cache, v_cache = arguments.floats(name, q=q, k_cache=k_cache, v_cache=v_cache)
    [lengths] = arguments.arrays(name, lengths=lengths)
    scale, softcap = _options(name, scale, softcap)
    wrong = _misfit(q, k_cache, v_cache, lengths, paged=False)
    if wrong is None and k_cache.shape[0] != q.shape[0]:
        wrong = f"q and k_cache must have one batch B, got q {q.shape} and k_cache {k_cache.shape}"
    wrong = wrong or _bad_length(lengths, k_cache.shape[1], "S")
    if wrong:
        raise ValueError(f"decode_attention: {wrong}.")
    arrays = (q, k_cache, v_cache, arguments.int32(name, "lengths", lengths, 0, k_cache.shape[1]))
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
    """`decode_attention` with a paged KV cache: pages of W keys, assigned to examples by a block table.

    Keys j W, ..., j W + W - 1 of example b are k_pages[block_table[b, j]]; the values are in v_pages at the same place.
    Entries of the table past the length, j W >= lengths[b], are not read and may hold any numbers.

    Args:
      q, k_pages, v_pages: of one dtype; N a multiple of K; W a power of two, at least 16.
      block_table: the page numbers of each example, in order.
      lengths: the number of keys of each example, from 0 to J W, including the new token's key. Lengths and page
        numbers that are not known, under jit, are cut to what exists.
      scale, softcap: as in `decode_attention`.
      implementation: a name in PAGED_DECODE_ATTENTION.kernels, or "xla"; if None, the fastest one known that runs here.

    Raises:
      ValueError: as `decode_attention`; or W is not such a power of two, or the table has a page number out of range
        (checked if its values are known).
      NotImplementedError: the named implementation cannot run these arguments here.

    Source: PagedAttention, https://arxiv.org/abs/2309.06180, section 4.1.
    """
    name = "paged_decode_attention"
    q, k_pages, v_pages = arguments.floats(name, q=q, k_pages=k_pages, v_pages=v_pages)
    block_table, lengths = arguments.arrays(name, block_table=block_table, lengths=lengths)
    arguments.nonempty(name, block_table=block_table)
    scale, softcap = _options(name, scale, softcap)
    wrong = _misfit(q, k_pages, v_pages, lengths, paged=True)
    wrong = wrong or _bad_table(block_table, lengths, k_pages)
    if wrong:
        raise ValueError(f"paged_decode_attention: {wrong}.")
    (P, W), J = k_pages.shape[:2], block_table.shape[1]
    if (table := _values(block_table)) is not None:  # what is past the lengths may be any numbers
        pages = arguments.int32(name, "block_table", np.clip(table, 0, P - 1), 0, P - 1)
    else:
        pages = arguments.int32(name, "block_table", block_table, 0, P - 1)
    arrays = (q, k_pages, v_pages, pages, arguments.int32(name, "lengths", lengths, 0, J * W))
    return PAGED_DECODE_ATTENTION(*arrays, scale=scale, softcap=softcap, implementation=implementation)


def _misfit(q, k, v, lengths, *, paged: bool) -> str | None:
    """The reason why the queries and the cache do not fit together, or None."""
    names, layout = ("k_pages and v_pages", "(P, W, K, H)") if paged else ("k_cache and v_cache", "(B, S, K, H)")
    if (q.ndim, k.ndim, v.ndim) != (3, 4, 4):
        return f"wanted q (B, N, H) and {names} {layout}, got {q.shape}, {k.shape} and {v.shape}; reshape them"
    if k.shape != v.shape:
        return f"{names} must have one shape {layout}, got {k.shape} and {v.shape}"
    if q.shape[2] != k.shape[3]:
        return f"q and {names} must have one head width H, got {q.shape[2]} and {k.shape[3]}"
    if q.shape[1] % k.shape[2]:
        return f"query heads must be a multiple of key heads, got N = {q.shape[1]} and K = {k.shape[2]}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, {names} must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them"
    if lengths.shape != q.shape[:1]:
        return f"lengths must be one number per example, (B,) = {q.shape[:1]}, got {lengths.shape}"
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        return f"lengths must be integers, got {lengths.dtype}; cast them to int32"
    return None


def _options(name: str, scale, softcap):
    """(scale, softcap) as Python numbers or None."""
    scale = None if scale is None else arguments.number(name, "scale", scale, "give scale=1.0 and multiply q by it")
    if softcap is not None:
        softcap = arguments.number(name, "softcap", softcap, "a learned soft cap is not supported", above=0)
    return scale, softcap


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
        return f"the page size must be a power of two, W >= {SMALLEST_PAGE}, got W = {W}"
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
        return f"block_table must hold page numbers 0 to {P - 1} below the lengths, got {table[b, j]} at [{b}, {j}]"
    return None


def _values(array) -> np.ndarray | None:
    """The values of an array if they are known."""
    return np.asarray(array) if arguments.known(array) else None
