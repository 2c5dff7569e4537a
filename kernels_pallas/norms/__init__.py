"""Normalisation fused with what a diffusion transformer does around it."""

from .api import (
    GATED_RESIDUAL_NORM as GATED_RESIDUAL_NORM,
    MODULATED_NORM as MODULATED_NORM,
    gated_residual_norm as gated_residual_norm,
    modulated_norm as modulated_norm,
)
