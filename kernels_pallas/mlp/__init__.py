"""The feed-forward layers of a transformer, whole: two products and what lies between them."""

from .api import (
    DENSE_MLP as DENSE_MLP,
    GATED_MLP as GATED_MLP,
    dense_mlp as dense_mlp,
    gated_mlp as gated_mlp,
)
