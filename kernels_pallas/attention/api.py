"""The public attention functions `flash_attention` and `merge_attention`, and the table of implementations."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import arguments
from ..op import Kernel, Op
from . import cost, cudnn, mosaic_gpu, mosaic_gpu_backward, triton
from .blocks import CANDIDATES
from .cases import CASES, SWEEP
from .mask import AttentionMask, misfit, settled
from .nonfinite import contained
from .reference import flash_attention as reference


FLASH_ATTENTION = Op(
    name="flash_attention",
    reference=reference,
    kernels={
        "mosaic_gpu": Kernel(
            *contained(mosaic_gpu.forward, mosaic_gpu_backward.backward),
            mosaic_gpu.unsupported,
            candidates=mosaic_gpu.CANDIDATES,
            needs_gpu_proof=True,
        ),
        "triton": Kernel(triton.forward, triton.backward, triton.unsupported, candidates=CANDIDATES),
        "cudnn": Kernel(*contained(cudnn.forward, cudnn.backward), cudnn.unsupported, external=True),
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
    """Softmax attention that does not write the T x S scores to memory (flash attention).

    out[t] = sum_s exp(score[t, s] - lse[t]) v[s] over the keys s that are visible to query t, where
    score[t, s] = scale <q[t], k[s]>, or softcap tanh(scale <q[t], k[s]> / softcap), and
    lse[t] = log(sum_s exp(score[t, s]) + exp(sink)). The softmax is in float32. Query head n uses key/value head
    n // (N / K) (grouped-query attention). A query without visible keys has output 0 and no gradient.

    With a mask, NaN and inf stay where they are visible: a hidden key or value, such as that of padding or of another
    packed document, and other queries change neither the output nor the gradients of a query and its keys. A query that
    sees NaN has output NaN. One exception: with "xla" NaN in the cotangent of the output reaches the gradients of all
    values. Values of a mask that break its rules under jit, where they are not known, are cut (`AttentionMask`). In the
    backward the weight of a key is at most 1, however scores round.

    Args:
      q, k, v: of one floating-point dtype; N a multiple of K.
      mask: which keys are visible to each query; if None, every key is visible to every query.
      scale: H**-0.5 if None. A number known before jit; for a learned scale give scale=1.0 and multiply q by it.
      softcap: bound of the scores, known before jit; no bound if None.
      sinks: one additional score per query head, in the units of `score`; it has weight in the softmax and no value.
      return_lse: also return lse, float32, -inf for a query without visible keys; it has a gradient. Used by
        `merge_attention`.
      implementation: a name in FLASH_ATTENTION.kernels, or "xla"; if None, the fastest one known that runs here.

    Raises:
      ValueError: the arguments do not fit together, or there is no such implementation.
      NotImplementedError: the named implementation cannot run these arguments here.

    Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2. Soft cap: Gemma 2,
    https://arxiv.org/abs/2408.00118, section 2. Attention sinks: https://arxiv.org/abs/2309.17453, as learned scores.
    """
    arrays, options = checked("flash_attention", q, k, v, mask, sinks, scale, softcap)
    options["return_lse"] = arguments.flag("flash_attention", "return_lse", return_lse)
    return FLASH_ATTENTION(*arrays, implementation=implementation, **options)


def merge_attention(
    out_a: Float[Array, "B T N H"],
    lse_a: Float[Array, "B T N"],
    out_b: Float[Array, "B T N H"],
    lse_b: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Merges the attention over two sets of keys into that over their union, as each step of ring attention does.

    lse = log(exp(lse_a) + exp(lse_b)); out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b, in float32.

    Raises:
      ValueError: the arrays are not of a floating-point dtype or do not fit together.

    Source: FlashAttention, https://arxiv.org/abs/2205.14135, section 3.1.
    """
    name = "merge_attention"
    out_a, lse_a, out_b, lse_b = arguments.floats(name, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.ndim != 4 or out_b.shape != out_a.shape or not lse_a.shape == lse_b.shape == out_a.shape[:3]:
        raise ValueError(
            f"{name}: wanted out_a and out_b (B, T, N, H) and lse_a and lse_b (B, T, N), got {out_a.shape}, "
            f"{out_b.shape}, {lse_a.shape} and {lse_b.shape}."
        )
    top = jnp.maximum(lse_a, lse_b)
    top = jnp.where(top == -jnp.inf, 0, top)  # no visible key in either set: -inf - -inf would be NaN
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    some = jnp.where(total == 0, 1, total)
    out32 = (out_a * (weight_a / some)[..., None] + out_b * (weight_b / some)[..., None]).astype(jnp.float32)
    return out32.astype(out_a.dtype), jnp.where(total == 0, -jnp.inf, top + jnp.log(some))


def checked(name: str, q, k, v, mask, sinks, scale, softcap):
    """(arrays, options) of an attention function called `name`; raises ValueError if they do not fit together."""
    q, k, v = arguments.floats(name, q=q, k=k, v=v)
    [sinks] = arguments.floats(name, optional=("sinks",), sinks=sinks)
    learned = "give scale=1.0 and multiply q by a learned scale"
    scale = None if scale is None else arguments.number(name, "scale", scale, learned)
    if softcap is not None:
        softcap = arguments.number(name, "softcap", softcap, "a learned soft cap is not supported", above=0)
    wrong = _misfit(q, k, v)
    if wrong is None and sinks is not None and sinks.shape != q.shape[2:3]:
        wrong = f"sinks must be one score per query head, (N,) = {q.shape[2:3]}, got {sinks.shape}"
    if wrong is None and mask is not None:
        wrong = misfit(mask, q.shape[0], q.shape[1], k.shape[1])
    if wrong:
        raise ValueError(f"{name}: {wrong}.")
    mask = None if mask is None else settled(mask, k.shape[1])
    return (q, k, v, mask, sinks), {"scale": scale, "softcap": softcap}


def _misfit(q, k, v) -> str | None:
    """The reason why these queries, keys and values do not fit together, or None."""
    if (q.ndim, k.ndim, v.ndim) != (4, 4, 4):
        return f"wanted q (B, T, N, H) and k, v (B, S, K, H), got {q.shape}, {k.shape}, {v.shape}; reshape them"
    if k.shape != v.shape:
        return f"k and v must have one shape (B, S, K, H), got {k.shape} and {v.shape}"
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        return f"q and k must agree in batch and head width, got q {q.shape} and k {k.shape}"
    if q.shape[2] % k.shape[2]:
        return f"query heads must be a multiple of key heads, got {q.shape[2]} and {k.shape[2]}; repeat k and v"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them"
    return None
