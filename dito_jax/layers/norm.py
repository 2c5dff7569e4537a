"""Adaptive normalization: the kernel, on whatever mesh is in force."""

import functools
from typing import Literal

from jaxtyping import Array, Float

from dito_jax.sharding import on_mesh
from kernels_pallas import modulated_norm


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

    `implementation="xla"` can be differentiated forward too; a kernel cannot.
    """
    # T D and D are whole on each device: the norm needs a whole row.
    norm = functools.partial(modulated_norm, kind=kind, implementation=implementation)
    return on_mesh(norm, ("B T .", "B .", "B ."), "B T .")(x, scale, shift)
