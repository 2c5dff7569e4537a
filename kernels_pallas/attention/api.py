"""The public attention function, and the table of what computes it."""

from jaxtyping import Array, Float

from ..op import Kernel, Op
from . import cost, triton
from .cases import CASES
from .reference import flash_attention as reference


FLASH_ATTENTION = Op(
    name="flash_attention",
    reference=reference,
    kernels={"triton": Kernel(triton.forward, triton.backward, triton.unsupported)},
    cost={"forward": cost.forward, "backward": cost.backward},
    cases=CASES,
)


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention that never writes its T x S scores to memory.

    out[t] = sum_s softmax_s(scale * <q[t], k[s]>) v[s], the softmax in float32; query head n reads the
    keys and values of head n // (N / K).

    Args:
      q, k, v: of one dtype; N a multiple of K.
      causal: query t sees keys s <= t + S - T: the last query sees every key, and where T > S the first
        see none; their output and gradient are zero.
      scale: H**-0.5 where None.
      implementation: a name in FLASH_ATTENTION.kernels, or "xla"; None takes the best that runs here.

    Raises:
      ValueError: the arrays do not fit together, or there is no such implementation.
      NotImplementedError: the named implementation cannot run these arguments here.

    Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
    """
    if misfit := _misfit(q, k, v):
        raise ValueError(f"flash_attention: {misfit}.")
    return FLASH_ATTENTION(q, k, v, causal=causal, scale=scale, implementation=implementation)


def _misfit(q, k, v) -> str | None:
    """Why these are not queries, keys and values of one attention; None where they are."""
    if (q.ndim, k.ndim, v.ndim) != (4, 4, 4):
        return f"want q (B, T, N, H) and k, v (B, S, K, H), got {q.shape}, {k.shape}, {v.shape}; reshape them"
    if k.shape != v.shape:
        return f"k and v must have one shape (B, S, K, H), got {k.shape} and {v.shape}"
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        return f"q and k must agree in batch and head width, got q {q.shape} and k {k.shape}"
    if q.shape[2] % k.shape[2]:
        return f"query heads must be a multiple of key heads, got {q.shape[2]} and {k.shape[2]}; repeat k and v"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them"
    return None
