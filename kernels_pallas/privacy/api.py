"""The public functions of this family, and their tables."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..op import Kernel, Op
from . import cost, reference, triton
from .blocks import CANDIDATES
from .cases import CLIP_REDUCE as CLIP_REDUCE_CASES, GHOST_NORM_SQ as GHOST_NORM_SQ_CASES


GHOST_NORM_SQ = Op(
    name="ghost_norm_sq",
    reference=reference.ghost_norm_sq,
    kernels={
        "triton": Kernel(
            triton.norm_forward,
            reference.ghost_norm_sq_backward,
            triton.norm_unsupported,
            candidates=CANDIDATES["pairs"] | CANDIDATES["matrix"],
        )
    },
    cost={"forward": cost.ghost_norm_sq},
    cases=GHOST_NORM_SQ_CASES,
)

CLIP_REDUCE = Op(
    name="clip_reduce",
    reference=reference.clip_reduce,
    kernels={
        "triton": Kernel(
            triton.clip_forward,
            reference.clip_reduce_backward,
            triton.clip_unsupported,
            candidates=CANDIDATES["clip"],
        )
    },
    cost={"forward": cost.clip_reduce},
    cases=CLIP_REDUCE_CASES,
)


def ghost_norm_sq(
    a: Float[Array, "B T D"],
    g: Float[Array, "B T F"],
    groups: Int[Array, "B T"] | None = None,
    *,
    bias: bool = False,
    implementation: str | None = None,
) -> Float[Array, " B"]:
    """The squared norm of each example's gradient of a linear layer y = x W, without the gradients in memory.

        out[b] = sum_e || sum_{t: groups[b,t] = e} a[b,t] g[b,t]^T ||_F^2

    in float32, products too. With `bias` the layer is x W + b, and each || sum_{t of e} g[b,t] ||^2 is added: a has a
    column of ones. Rounding errs by some 1e-7 of sum_{t,s of one group} |<a_t, a_s> <g_t, g_s>|, which is more than
    the norm's own size where the terms of a gradient cancel; the result is never below zero.

    Args:
      a: the layer's inputs.
      g: the gradients of its outputs, of the example's own loss.
      groups: which weight matrix each row has met, such as an expert's number. A row whose group is negative does not
        count, and may hold anything. None: all rows have met one.
      bias: whether the layer has one; an expert's its own.
      implementation: one of GHOST_NORM_SQ's; the best that runs here where None.

    Raises:
      ValueError: the shapes do not fit each other, groups are no integers, or `implementation` is unknown.
      NotImplementedError: `implementation` cannot run here.

    Source: Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679, section 4.
    """
    wrong = _misfit(a, g)
    if wrong is None and groups is not None:
        if groups.shape != a.shape[:2]:
            wrong = f"groups must be one number a row, (B, T) = {a.shape[:2]}, got {groups.shape}"
        elif not jnp.issubdtype(groups.dtype, jnp.integer):
            wrong = f"groups must be integers, got {groups.dtype}; cast them to int32"
        else:
            groups = groups.astype(jnp.int32)
    if wrong:
        raise ValueError(f"ghost_norm_sq: {wrong}.")
    return GHOST_NORM_SQ(a, g, groups, bias=bias, implementation=implementation)


def clip_reduce(
    a: Float[Array, "B T D"],
    g: Float[Array, "B T F"],
    c: Float[Array, " B"],
    *,
    implementation: str | None = None,
) -> Float[Array, "D F"]:
    """The sum of examples' gradients of a linear layer, each times its clip factor: sum_b c[b] sum_t a[b,t] g[b,t]^T.

    In float32, products too: c meets the product, not g, so an example keeps its bound to some 1e-7. One whose c is 0
    adds nothing, whatever it holds, NaN too, and its factor's gradient is 0.

    Args:
      a, g: as of `ghost_norm_sq`.
      c: such as min(1, C / norm).
      implementation: one of CLIP_REDUCE's; the best that runs here where None.

    Raises:
      ValueError: the shapes do not fit each other, or `implementation` is unknown.
      NotImplementedError: `implementation` cannot run here.

    Source: Bu et al., arXiv 2210.00038, section 2.
    """
    wrong = _misfit(a, g)
    if wrong is None and c.shape != a.shape[:1]:
        wrong = f"c must be one number an example, (B,) = {a.shape[:1]}, got {c.shape}"
    if wrong:
        raise ValueError(f"clip_reduce: {wrong}.")
    return CLIP_REDUCE(a, g, c.astype(jnp.float32), implementation=implementation)


def _misfit(a, g) -> str | None:
    """Why these are not a layer's inputs and the gradients of its outputs; None where they are."""
    if a.ndim != 3 or g.ndim != 3 or a.shape[:2] != g.shape[:2]:
        return f"a {a.shape} and g {g.shape} do not fit; give a as (B, T, D) and g as (B, T, F)"
    if 0 in a.shape + g.shape:
        return f"a {a.shape} and g {g.shape} must have no dimension of size 0"
    return None
