"""DP-SGD kernels for linear layers: per-example gradient norms (ghost norms), and sums of clipped gradients."""

from .api import (
    CLIP_REDUCE as CLIP_REDUCE,
    GHOST_NORM_SQ as GHOST_NORM_SQ,
    clip_reduce as clip_reduce,
    ghost_norm_sq as ghost_norm_sq,
)
