"""Fused transformer MLPs: the gated MLP (SwiGLU, GEGLU) and the dense MLP, both products and the activation."""

from .api import (
    DENSE_MLP as DENSE_MLP,
    GATED_MLP as GATED_MLP,
    dense_mlp as dense_mlp,
    gated_mlp as gated_mlp,
)
