"""The public attention functions, and the table of what computes them."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..op import Kernel, Op
from . import cost, cudnn, mosaic_gpu, mosaic_gpu_backward, triton
from .blocks import CANDIDATES
from .cases import CASES, SWEEP
from .mask import AttentionMask, misfit
from .reference import flash_attention as reference


FLASH_ATTENTION = Op(
    name="flash_attention",
    reference=reference,
    kernels={
        "mosaic_gpu": Kernel(
            mosaic_gpu.forward,
            mosaic_gpu_backward.backward,
            mosaic_gpu.unsupported,
            candidates=mosaic_gpu.CANDIDATES,
            needs_gpu_proof=True,
        ),
        "triton": Kernel(triton.forward, triton.backward, triton.unsupported, candidates=CANDIDATES),
        "cudnn": Kernel(cudnn.forward, cudnn.backward, cudnn.unsupported, external=True),
    },
    cost={"forward": cost.forward, "backward": cost.backward},
    cases=CASES,
    sweep=SWEEP,
)


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention that never writes its T x S scores to memory.

    out[t] = sum_s exp(score[t, s] - lse[t]) v[s] over the keys s that the mask lets query t see, where
    score[t, s] = scale <q[t], k[s]>, or softcap tanh(scale <q[t], k[s]> / softcap), and
    lse[t] = log(sum_s exp(score[t, s]) + exp(sink)). The softmax is in float32. Query head n reads the keys and
    values of head n // (N / K). A query that sees nothing has output 0, and no gradient.

    Args:
      q, k, v: of one dtype; N a multiple of K.
      mask: who sees whom; None where every query sees every key.
      scale: H**-0.5 where None.
      softcap: bounds the scores; unbounded where None.
      sinks: for each query head one more score, in units of `score`, that takes weight and has no value.
      return_lse: also returns lse, float32, -inf where a query sees nothing; its gradient flows. For `merge_attention`.
      implementation: a name in FLASH_ATTENTION.kernels, or "xla"; None takes the best that runs here.

    Raises:
      ValueError: the arguments do not fit together, or there is no such implementation.
      NotImplementedError: the named implementation cannot run these arguments here.

    Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2. Soft cap: Gemma 2,
    https://arxiv.org/abs/2408.00118, section 2. Sinks: https://arxiv.org/abs/2309.17453, as a learned score a head.
    """
    check("flash_attention", q, k, v, mask, sinks, scale, softcap)
    options = {"scale": scale, "softcap": softcap, "return_lse": return_lse}
    return FLASH_ATTENTION(q, k, v, mask, sinks, implementation=implementation, **options)


def merge_attention(
    out_a: Float[Array, "B T N H"],
    lse_a: Float[Array, "B T N"],
    out_b: Float[Array, "B T N H"],
    lse_b: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention over two sets of keys, from the attention over each: what ring attention does at each hop.

    lse = log(exp(lse_a) + exp(lse_b)); out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b, in float32.

    Source: FlashAttention, https://arxiv.org/abs/2205.14135, section 3.1.
    """
    top = jnp.maximum(lse_a, lse_b)
    top = jnp.where(top == -jnp.inf, 0, top)  # neither saw anything: -inf - -inf would be nan
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    some = jnp.where(total == 0, 1, total)
    out32 = (out_a * (weight_a / some)[..., None] + out_b * (weight_b / some)[..., None]).astype(jnp.float32)
    return out32.astype(out_a.dtype), jnp.where(total == 0, -jnp.inf, top + jnp.log(some))


def check(name: str, q, k, v, mask, sinks, scale, softcap) -> None:
    """Raises ValueError, in the name of a function, where its arguments make no attention."""
    wrong = _misfit(q, k, v) or _bad_option(q, sinks, scale, softcap)
    if wrong is None and mask is not None:
        wrong = misfit(mask, q.shape[0], q.shape[1], k.shape[1])
    if wrong:
        raise ValueError(f"{name}: {wrong}.")


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


def _bad_option(q, sinks, scale, softcap) -> str | None:
    """What is wrong with the options; None where nothing is."""
    if scale is not None and not math.isfinite(scale):
        return f"scale must be a finite number, got {scale}"
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        return f"softcap must be a finite number above 0, got {softcap}"
    if sinks is not None and sinks.shape != q.shape[2:3]:
        return f"sinks must be one score a query head, (N,) = {q.shape[2:3]}, got {sinks.shape}"
    return None
