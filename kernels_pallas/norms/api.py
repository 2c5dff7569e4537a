"""The public functions of this family, and their tables."""

from typing import Literal, get_args

from jaxtyping import Array, Float

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
    """Normalises each token, then scales and shifts it by its conditioning (adaLN).

        y = norm(x) * weight * (1 + scale) + shift
        norm(x) = (x - mean) / sqrt(var + eps)       kind="layer"
                  x / sqrt(mean(x**2) + eps)         kind="rms"

    `scale` and `shift` are (B, D), one for all tokens of an example, or (B, T, D), one for each token; what is left
    out is not multiplied or added. Statistics are over D, in float32; `y` has the dtype of `x`. Each gradient has the
    dtype of its own input, so that float32 `scale` and `shift` beside a bfloat16 `x` lose nothing.

    Raises:
      ValueError: the shapes do not fit each other, or `kind` or `implementation` is unknown.
      NotImplementedError: `implementation` cannot run here.

    Source: Peebles and Xie, arXiv 2212.09748, section 3.2; LayerNorm arXiv 1607.06450, equation 3; RMSNorm
    arXiv 1910.07467, equation 4.
    """
    _check("modulated_norm", kind, x, weight=weight, scale=scale, shift=shift)
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
    """Adds what a branch of a block says through a gate, and normalises the sum for the next branch: (x_new, y).

        x_new = x + gate * branch
        y = modulated_norm(x_new, scale, shift, weight)

    One pass over memory where the three take three. `x_new` is rounded to the dtype of `x` before it is normalised.
    `gate` is (B, D) or (B, T, D), as `scale` and `shift` are, each for itself.

    Raises:
      ValueError: the shapes do not fit each other, or `kind` or `implementation` is unknown.
      NotImplementedError: `implementation` cannot run here.

    Source: adaLN-Zero, arXiv 2212.09748, section 3.2.
    """
    if branch.shape != x.shape or branch.dtype != x.dtype:
        raise ValueError(
            f"gated_residual_norm: branch {branch.shape} {branch.dtype} is unlike x {x.shape} {x.dtype}; "
            "give both in one shape and dtype."
        )
    _check("gated_residual_norm", kind, x, weight=weight, gate=gate, scale=scale, shift=shift)
    arrays = (x, branch, gate, scale, shift, weight)
    return GATED_RESIDUAL_NORM(*arrays, kind=kind, eps=eps, implementation=implementation)


def _check(name, kind, x, *, weight, **modulation) -> None:
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
