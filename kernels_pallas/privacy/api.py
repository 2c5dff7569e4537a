"""The public DP-SGD functions, `ghost_norm_sq` and `clip_reduce`, and their implementation tables."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import arguments
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
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Ghost norm: the squared per-example gradient norms of a linear layer y = x W, without the gradients in memory.

        squares[b] = sum_e || sum_{t: groups[b,t] = e} a[b,t] g[b,t]^T ||_F^2

    in float32, including products. With `bias` the layer is x W + b, and || sum_{t of e} g[b,t] ||^2 is added for each
    group e, as if a had a column of ones. The rounding error is about 1e-7 of
    sum_{t,s of one group} |<a_t, a_s> <g_t, g_s>|, which exceeds the norm itself if the terms of a gradient cancel. The
    squares are never negative.

    The second result, `bound`, is for clipping: it is an upper bound of the exact squared norm, and of that of the
    gradient as `clip_reduce` computes it, in the arithmetic of float32 and of tensor cores (rounding.py). Gradients
    whose bound is at most C^2 have no norm above C, even if their terms cancel. The bound is not differentiated.

    Args:
      a: the layer's inputs.
      g: the gradients of each example's own loss with respect to the layer's outputs.
      groups: the weight matrix of each row, for example its expert. Rows with a negative group are padding: they are
        ignored and may be NaN. None: all rows have the same matrix.
      bias: whether the layer has a bias (for experts: one bias per expert).
      implementation: a name in GHOST_NORM_SQ.kernels, or "xla"; if None, the fastest one known that runs here.

    Returns:
      (squares, bound), float32 (B,) each.

    Raises:
      ValueError: the shapes do not fit together, groups are not integers, or `implementation` is unknown.
      NotImplementedError: `implementation` cannot run these arguments here.

    Source: Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679, section 4.
    """
    a, g, groups = _checked(a, g, groups)
    bias = arguments.flag("ghost_norm_sq", "bias", bias)
    return GHOST_NORM_SQ(a, g, groups, bias=bias, implementation=implementation)


def clip_reduce(
    a: Float[Array, "B T D"],
    g: Float[Array, "B T F"],
    c: Float[Array, " B"],
    *,
    implementation: str | None = None,
) -> Float[Array, "D F"]:
    """The sum of clipped per-example gradients of a linear layer: sum_b c[b] sum_t a[b,t] g[b,t]^T.

    In float32, including products. c multiplies the product and not g, so that rounding changes the norm of an example
    by only about 1e-7. An example with c = 0 adds nothing, even if it is NaN, and the gradient of its factor is 0.

    Args:
      a, g: as in `ghost_norm_sq`.
      c: the clip factors, for example min(1, C / norm).
      implementation: a name in CLIP_REDUCE.kernels, or "xla"; if None, the fastest one known that runs here.

    Raises:
      ValueError: the shapes do not fit together, or `implementation` is unknown.
      NotImplementedError: `implementation` cannot run these arguments here.

    Source: Bu et al., arXiv 2210.00038, section 2.
    """
    a, g = _floats("clip_reduce", a=a, g=g)
    [c] = arguments.floats("clip_reduce", c=c)
    wrong = _misfit(a, g)
    if wrong is None and c.shape != a.shape[:1]:
        wrong = f"c must be one number per example, (B,) = {a.shape[:1]}, got {c.shape}"
    if wrong:
        raise ValueError(f"clip_reduce: {wrong}.")
    return CLIP_REDUCE(a, g, c.astype(jnp.float32), implementation=implementation)


def _checked(a, g, groups):
    """The arrays of `ghost_norm_sq`, groups as int32 or None; raises ValueError if they do not fit together."""
    name, most = "ghost_norm_sq", arguments.LARGEST
    a, g = _floats(name, a=a, g=g)
    [groups] = arguments.arrays(name, optional=("groups",), groups=groups)
    wrong = _misfit(a, g)
    if wrong is None and groups is not None:
        if groups.shape != a.shape[:2]:
            wrong = f"groups must be one number per row, (B, T) = {a.shape[:2]}, got {groups.shape}"
        elif not jnp.issubdtype(groups.dtype, jnp.integer):
            wrong = f"groups must be integers, got {groups.dtype}; cast them to int32"
        else:
            groups = arguments.int32(name, "groups", groups, -most, most, outside=-1)
    if wrong:
        raise ValueError(f"{name}: {wrong}.")
    return a, g, groups


def _floats(name: str, **named):
    """The arrays, of a floating-point dtype; `_misfit` says what else is wrong with them."""
    found = arguments.arrays(name, **named)
    for called, x in zip(named, found, strict=True):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: {called} must be of a floating-point dtype, got {x.dtype}; cast it.")
    return found


def _misfit(a, g) -> str | None:
    """The reason why the inputs and the gradients of the outputs do not fit together, or None."""
    if a.ndim != 3 or g.ndim != 3 or a.shape[:2] != g.shape[:2]:
        return f"a {a.shape} and g {g.shape} do not fit; give a as (B, T, D) and g as (B, T, F)"
    if 0 in a.shape + g.shape:
        return f"a {a.shape} and g {g.shape} must have no dimension of size 0"
    return None
