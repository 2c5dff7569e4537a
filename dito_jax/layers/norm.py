"""Adaptive normalization: the kernel, on whatever mesh is in force."""

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
) -> Float[Array, "B T D"]:
    """norm(x) * (1 + scale) + shift, one scale and shift for each example (adaLN, arXiv 2212.09748 §3.2)."""
    # T D and D are whole on each device: the norm needs a whole row.
    norm = on_mesh(lambda *arrays: modulated_norm(*arrays, kind=kind), ("B T .", "B .", "B ."), "B T .")
    return norm(x, scale, shift)
