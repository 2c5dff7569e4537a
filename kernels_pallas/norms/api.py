"""The public functions of this family, and their tables."""

from typing import Literal, get_args

from jaxtyping import Array, Float

from ..op import Kernel, Op
from . import cost, reference, triton
from .cases import CASES


Kind = Literal["layer", "rms"]

MODULATED_NORM = Op(
    name="modulated_norm",
    reference=reference.modulated_norm,
    kernels={"triton": Kernel(triton.forward, triton.backward, triton.unsupported)},
    cost={"forward": cost.forward, "backward": cost.backward},
    cases=CASES,
)


def modulated_norm(
    x: Float[Array, "B T D"],
    scale: Float[Array, "B D"],
    shift: Float[Array, "B D"],
    *,
    kind: Kind = "layer",
    eps: float = 1e-6,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """Normalises each token, then scales and shifts it by its example's conditioning (adaLN).

        y = norm(x) * (1 + scale) + shift
        norm(x) = (x - mean) / sqrt(var + eps)       kind="layer"
                  x / sqrt(mean(x**2) + eps)         kind="rms"

    Statistics are over D, without learned weights, in float32; `y` has the dtype of `x`. Each gradient has
    the dtype of its own input, so that float32 `scale` and `shift` beside a bfloat16 `x` lose nothing.

    Raises:
      ValueError: the shapes do not fit each other, or `kind` or `implementation` is unknown.
      NotImplementedError: `implementation` cannot run here.

    Source: Peebles and Xie, arXiv 2212.09748, section 3.2; LayerNorm arXiv 1607.06450, equation 3; RMSNorm
    arXiv 1910.07467, equation 4.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"modulated_norm: no {kind=}; choose from {', '.join(get_args(Kind))}.")
    if x.ndim != 3 or not scale.shape == shift.shape == (x.shape[0], x.shape[2]):
        raise ValueError(
            f"modulated_norm: x {x.shape}, scale {scale.shape} and shift {shift.shape} do not fit; "
            "give x as (B, T, D), scale and shift as (B, D)."
        )
    return MODULATED_NORM(x, scale, shift, kind=kind, eps=eps, implementation=implementation)
