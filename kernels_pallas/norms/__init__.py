"""Normalisation fused with what a diffusion transformer does around it."""

from .api import MODULATED_NORM as MODULATED_NORM, modulated_norm as modulated_norm
