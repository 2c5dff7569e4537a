"""Attention with forward-mode derivatives: `flash_attention_jvp`.

In JAX a custom_vjp supports reverse mode only, and a custom_jvp needs a tangent that JAX can transpose, which a kernel
is not. A `HiPrim` primitive supports both: reverse mode calls the kernels' backward, forward mode calls the tangent
kernel, and the transpose of the tangent calls the backward again, which `jax.remat` needs for its gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import hijax
from jaxtyping import Array, Float

from ..op import Kernel, Op
from . import cost, triton_jvp
from .api import FLASH_ATTENTION, checked
from .blocks import TANGENT_CANDIDATES
from .cases import TANGENT_CASES
from .mask import AttentionMask
from .reference import flash_attention_tangent as reference


SECOND_ORDER = (
    "flash_attention_jvp: second derivatives are not supported; apply jax.lax.stop_gradient to what is computed from "
    'the tangent, or use flash_attention(implementation="xla").'
)
FLASH_ATTENTION_TANGENT = Op(
    name="flash_attention_tangent",
    reference=reference,
    kernels={
        "triton": Kernel(
            triton_jvp.forward, triton_jvp.backward, triton_jvp.unsupported, candidates=TANGENT_CANDIDATES
        ),
    },
    cost={"forward": cost.tangent_forward, "backward": cost.tangent_backward},
    cases=TANGENT_CASES,
)


def flash_attention_jvp(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """`flash_attention` with forward-mode derivatives (`jax.jvp`), which MeanFlow training needs.

    `jax.jvp` runs an additional kernel for the tangent. `jax.grad` is that of `flash_attention`, also through the value
    of a `jax.jvp`. Only first derivatives are supported: a gradient of the tangent raises an error. Apply
    `jax.lax.stop_gradient` to the tangent, as MeanFlow does, or use flash_attention(implementation="xla").

    Args and raises: as `flash_attention`; `implementation` is that of the value, and also of the tangent if it is
    "xla". Raises NotImplementedError for a gradient of the tangent.

    Source: MeanFlow, https://arxiv.org/abs/2505.13447, algorithm 1; the tangent, sCM,
    https://arxiv.org/abs/2410.11081.
    """
    arrays, options = checked("flash_attention_jvp", q, k, v, mask, sinks, scale, softcap)
    return _Attention(jax.tree.map(jax.typeof, arrays), **options, implementation=implementation)(*arrays)


class _LikeQueries(hijax.HiPrim):
    """A primitive whose result has the shape and dtype of its first argument; vmap batches along dim 0."""

    params: dict[str, Any]
    lin, linearized = hijax.linearize_from_jvp

    def __init__(self, in_avals, scale, softcap, implementation):
        self.in_avals = in_avals
        self.out_aval = in_avals[0]
        self.params = {"scale": scale, "softcap": softcap, "implementation": implementation}
        super().__init__()

    def batch_dim_rule(self, axis_data, dims):
        del axis_data, dims
        return 0


class _Attention(_LikeQueries):
    """The primitive (q, k, v, mask, sinks) -> out."""

    def expand(self, *arrays):
        return FLASH_ATTENTION(*arrays, return_lse=False, **self.params)

    def vjp_fwd(self, nonzeros, q, k, v, mask, sinks):
        del nonzeros
        return jax.vjp(lambda q, k, v, sinks: self.expand(q, k, v, mask, sinks), q, k, v, sinks)

    def vjp_bwd_retval(self, vjp, d_out):
        d_q, d_k, d_v, d_sinks = vjp(d_out)
        return d_q, d_k, d_v, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.in_avals[3]), d_sinks

    def jvp(self, primals, tangents):
        q, k, v, mask, sinks = primals
        t_q, t_k, t_v = (hijax.instantiate_zeros(t) for t in tangents[:3])
        out, lse = FLASH_ATTENTION(*primals, return_lse=True, **self.params)
        options = {**self.params, "implementation": "xla" if self.params["implementation"] == "xla" else None}
        arrays = (q, k, v, mask, out, lse, t_q, t_k, t_v)
        t_out = _Tangent(jax.tree.map(jax.typeof, arrays), **options)(*arrays)
        if sinks is not None and not isinstance(tangents[4], hijax.Zero):
            score = sinks.astype(jnp.float32)[None, None, :]
            taken = jnp.exp(jnp.minimum(score - jnp.where(lse == -jnp.inf, jnp.inf, lse), 0))
            taken = taken * tangents[4].astype(jnp.float32)[None, None, :]
            t_out = t_out - (taken[..., None] * out.astype(jnp.float32)).astype(out.dtype)
        return out, t_out


class _Tangent(_LikeQueries):
    """The primitive (q, k, v, mask, out, lse, t_q, t_k, t_v) -> t_out: linear in the tangents, first order only."""

    def expand(self, *arrays):
        return FLASH_ATTENTION_TANGENT(*arrays, **self.params)

    def transpose(self, d_t_out, *accumulators):
        known, linear = accumulators[:6], accumulators[6:]
        zeros = [jnp.zeros(a.shape, a.dtype) for a in self.in_avals[6:]]
        _, vjp = jax.vjp(lambda *tangents: self.expand(*known, *tangents), *zeros)
        for accumulator, cotangent in zip(linear, vjp(d_t_out), strict=True):
            if isinstance(accumulator, hijax.GradAccum):  # a zero tangent has no accumulator
                accumulator.accum(cotangent)

    def jvp(self, primals, tangents):
        some = next(t for t in jax.tree.leaves(tangents, is_leaf=_is_zero) if not _is_zero(t))
        return self(*primals), _SecondOrder((jax.typeof(some),), self.out_aval)(some)

    def vjp_fwd(self, nonzeros, *arrays):
        del nonzeros
        return self(*arrays), None

    def vjp_bwd_retval(self, residuals, d_t_out):
        raise NotImplementedError(SECOND_ORDER)


class _SecondOrder(hijax.HiPrim):
    """Placeholder for the tangent of the tangent: `jax.remat` traces one even if nothing uses it."""

    def __init__(self, in_avals, out_aval):
        self.in_avals, self.out_aval, self.params = in_avals, out_aval, {"out_aval": out_aval}
        super().__init__()

    def expand(self, tangent):
        raise NotImplementedError(SECOND_ORDER)

    def transpose(self, cotangent, *accumulators):
        raise NotImplementedError(SECOND_ORDER)

    def batch_dim_rule(self, axis_data, dims):
        del axis_data, dims
        return 0


def _is_zero(tangent) -> bool:
    return isinstance(tangent, hijax.Zero)
