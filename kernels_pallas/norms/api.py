"""The public norms, `modulated_norm` (adaLN) and `gated_residual_norm`, and their implementation tables."""

from typing import Literal, get_args

from jaxtyping import Array, Float

from .. import arguments
from ..op import Kernel, Op
from . import cost, reference, triton
from .cases import NORM_CASES, RESIDUAL_CASES
from .reference import Modulation


Kind = Literal["layer", "rms"]

MODULATED_NORM = Op(
    name="modulated_norm",
    reference=reference.modulated_norm,
    kernels={"triton": Kernel(triton.forward, triton.backward, triton.unsupported)},
    cost={"forward": cost.forward, "backward": cost.backward},
    cases=NORM_CASES,
)
GATED_RESIDUAL_NORM = Op(
    name="gated_residual_norm",
    reference=reference.gated_residual_norm,
    kernels={"triton": Kernel(triton.residual_forward, triton.residual_backward, triton.unsupported)},
    cost={"forward": cost.residual_forward, "backward": cost.residual_backward},
    cases=RESIDUAL_CASES,
)


def modulated_norm(
    x: Float[Array, "B T D"],
    scale: Modulation | None = None,
    shift: Modulation | None = None,
    *,
    weight: Float[Array, " D"] | None = None,
    kind: Kind = "layer",
    eps: float = 1e-6,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """LayerNorm or RMSNorm of each token with adaLN modulation (scale and shift from the conditioning).

        y = norm(x) * weight * (1 + scale) + shift
        norm(x) = (x - mean) / sqrt(var + eps)       kind="layer"
                  x / sqrt(mean(x**2) + eps)         kind="rms"

    `scale` and `shift` are (B, D), shared by all tokens of an example, or (B, T, D), one per token. An omitted factor
    or summand is left out. Statistics are over D, in float32; `y` has the dtype of `x`. Each gradient has the dtype of
    its input, so float32 `scale` and `shift` have float32 gradients even if `x` is bfloat16.

    NaN in a token stays in it, but for the gradients of what tokens share. `eps` is a number known before jit.

    Raises:
      ValueError: the shapes or dtypes do not fit together, `eps` is no number of 0 or more, or `kind` or
        `implementation` is unknown.
      NotImplementedError: `implementation` cannot run these arguments here.

    Source: Peebles and Xie, arXiv 2212.09748, section 3.2; LayerNorm arXiv 1607.06450, equation 3; RMSNorm
    arXiv 1910.07467, equation 4.
    """
    [x] = arguments.floats("modulated_norm", x=x)
    weight, eps = _check("modulated_norm", kind, eps, x, weight=weight, scale=scale, shift=shift)
    return MODULATED_NORM(x, scale, shift, weight, kind=kind, eps=eps, implementation=implementation)


def gated_residual_norm(
    x: Float[Array, "B T D"],
    branch: Float[Array, "B T D"],
    gate: Modulation,
    scale: Modulation | None = None,
    shift: Modulation | None = None,
    *,
    weight: Float[Array, " D"] | None = None,
    kind: Kind = "layer",
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Gated residual connection fused with the next modulated norm (adaLN-Zero): (x_new, y).

        x_new = x + gate * branch
        y = modulated_norm(x_new, scale, shift, weight)

    One pass over memory instead of three. `x_new` is rounded to the dtype of `x` before it is normalised. Each of
    `gate`, `scale` and `shift` is (B, D) or (B, T, D).

    NaN in a token stays in it, but for the gradients of what tokens share. `eps` is a number known before jit.

    Raises:
      ValueError: the shapes or dtypes do not fit together, `eps` is no number of 0 or more, or `kind` or
        `implementation` is unknown.
      NotImplementedError: `implementation` cannot run these arguments here.

    Source: adaLN-Zero, arXiv 2212.09748, section 3.2.
    """
    x, branch, gate = arguments.floats("gated_residual_norm", x=x, branch=branch, gate=gate)
    if branch.shape != x.shape or branch.dtype != x.dtype:
        raise ValueError(
            f"gated_residual_norm: branch {branch.shape} {branch.dtype} does not fit x {x.shape} {x.dtype}; "
            "give both with the same shape and dtype."
        )
    weight, eps = _check("gated_residual_norm", kind, eps, x, weight=weight, gate=gate, scale=scale, shift=shift)
    arrays = (x, branch, gate, scale, shift, weight)
    return GATED_RESIDUAL_NORM(*arrays, kind=kind, eps=eps, implementation=implementation)


def _check(name, kind, eps, x, *, weight, **modulation):
    """(weight, eps), checked like the others; raises ValueError if the arguments do not fit together."""
    [weight] = arguments.floats(name, optional=("weight",), weight=weight)
    arguments.floats(name, optional=("scale", "shift"), **modulation)
    eps = arguments.number(name, "eps", eps, "a learned eps is not supported", low=0)
    if kind not in get_args(Kind):
        raise ValueError(f"{name}: no {kind=}; choose from {', '.join(get_args(Kind))}.")
    if x.ndim != 3:
        raise ValueError(f"{name}: x is {x.shape}; give it as (B, T, D).")
    B, T, D = x.shape
    for called, array in modulation.items():
        if array is not None and array.shape not in ((B, D), (B, T, D)):
            raise ValueError(
                f"{name}: {called} {array.shape} does not fit x {x.shape}; "
                f"give it as (B, D) = {(B, D)} or (B, T, D) = {(B, T, D)}."
            )
    if weight is not None and weight.shape != (D,):
        raise ValueError(f"{name}: weight {weight.shape} does not fit x {x.shape}; give it as (D,) = {(D,)}.")
    return weight, eps
