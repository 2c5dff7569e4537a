"""Attention that can be differentiated forward as well: `flash_attention_jvp`.

JAX ties a custom_vjp to reverse mode and a custom_jvp to a tangent that it must transpose by itself; a kernel needs
both. A `HiPrim` has both: reverse mode is the kernels' own backward, forward mode adds the tangent's kernel, and the
tangent's transpose is that backward again, which is how `jax.remat` comes to its gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import hijax
from jaxtyping import Array, Float

from ..op import Kernel, Op
from . import cost, triton_jvp
from .api import FLASH_ATTENTION, check
from .blocks import TANGENT_CANDIDATES
from .cases import TANGENT_CASES
from .mask import AttentionMask
from .reference import flash_attention_tangent as reference


SECOND_ORDER = (
    "flash_attention_jvp: the tangent has no derivative of its own; put jax.lax.stop_gradient around what is made of "
    'it, or use flash_attention(implementation="xla").'
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
    """`flash_attention`, for models that are differentiated forward, as MeanFlow does.

    `jax.jvp` runs one more kernel, for the tangent; `jax.grad` is that of `flash_attention`, also through the value
    of a `jax.jvp`. First order: what comes of the tangent has no gradient, and asking for one raises; put
    `jax.lax.stop_gradient` around it, as MeanFlow does, or use flash_attention(implementation="xla").

    Args and raises: as `flash_attention`; `implementation` names that of the value, and of the tangent where it is
    "xla". NotImplementedError where a gradient is asked of the tangent.

    Source: MeanFlow, https://arxiv.org/abs/2505.13447, algorithm 1; the tangent, sCM,
    https://arxiv.org/abs/2410.11081.
    """
    check("flash_attention_jvp", q, k, v, mask, sinks, scale, softcap)
    arrays = (q, k, v, mask, sinks)
    return _Attention(jax.tree.map(jax.typeof, arrays), scale, softcap, implementation)(*arrays)


class _LikeQueries(hijax.HiPrim):
    """A function of arrays whose value has the shape of the first; under vmap the examples come first."""

    params: dict[str, Any]

    def __init__(self, in_avals, scale, softcap, implementation):
        self.in_avals = in_avals
        self.out_aval = in_avals[0]
        self.params = {"scale": scale, "softcap": softcap, "implementation": implementation}
        super().__init__()

    def batch_dim_rule(self, axis_data, dims):
        del axis_data, dims
        return 0


class _Attention(_LikeQueries):
    """out of (q, k, v, mask, sinks)."""

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
            taken = jnp.exp(sinks.astype(jnp.float32)[None, None, :] - jnp.where(lse == -jnp.inf, jnp.inf, lse))
            taken = taken * tangents[4].astype(jnp.float32)[None, None, :]
            t_out = t_out - (taken[..., None] * out.astype(jnp.float32)).astype(out.dtype)
        return out, t_out


class _Tangent(_LikeQueries):
    """t_out of (q, k, v, mask, out, lse, t_q, t_k, t_v): linear in the last three, and of first order."""

    def expand(self, *arrays):
        return FLASH_ATTENTION_TANGENT(*arrays, **self.params)

    def transpose(self, d_t_out, *accumulators):
        known, linear = accumulators[:6], accumulators[6:]
        zeros = [jnp.zeros(a.shape, a.dtype) for a in self.in_avals[6:]]
        _, vjp = jax.vjp(lambda *tangents: self.expand(*known, *tangents), *zeros)
        for accumulator, cotangent in zip(linear, vjp(d_t_out), strict=True):
            if isinstance(accumulator, hijax.GradAccum):  # a tangent that is zero has none
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
    """Stands where the tangent of the tangent would, for `jax.remat` makes one even where nothing reads it."""

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
