"""Adaptive normalization (adaLN) by the kernels of kernels_pallas, on the current mesh."""

import functools
from typing import Literal

from jaxtyping import Array, Float

from dito_jax.sharding import on_mesh
from kernels_pallas import gated_residual_norm, modulated_norm


NormKind = Literal["layer", "rms"]


def adaptive_norm(
    x: Float[Array, "B T D"],
    scale: Float[Array, "B D"],
    shift: Float[Array, "B D"],
    *,
    kind: NormKind,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """norm(x) * (1 + scale) + shift, one scale and shift for each example (adaLN, arXiv 2212.09748 §3.2).

    `implementation="xla"` supports forward-mode differentiation; the kernels do not.
    """
    # T and D are not sharded: the norm needs whole rows.
    norm = functools.partial(modulated_norm, kind=kind, implementation=implementation)
    return on_mesh(norm, ("B T .", "B .", "B ."), "B T .")(x, scale, shift)


def residual_norm(
    x: Float[Array, "B T D"],
    branch: Float[Array, "B T D"],
    gate: Float[Array, "B D"],
    scale: Float[Array, "B D"],
    shift: Float[Array, "B D"],
    *,
    kind: NormKind,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Returns x + gate * branch and the adaptive norm of that, in one pass over memory."""
    norm = functools.partial(gated_residual_norm, kind=kind, implementation=implementation)
    dims = ("B T .", "B T .", "B .", "B .", "B .")
    return on_mesh(norm, dims, ("B T .", "B T ."))(x, branch, gate, scale, shift)
