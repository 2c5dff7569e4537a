"""Fused norms: LayerNorm and RMSNorm with adaLN modulation, and with a gated residual connection."""

from .api import (
    GATED_RESIDUAL_NORM as GATED_RESIDUAL_NORM,
    MODULATED_NORM as MODULATED_NORM,
    gated_residual_norm as gated_residual_norm,
    modulated_norm as modulated_norm,
)
