"""Fused QK-norm and rotary position embedding (RoPE) of queries and keys."""

from .api import QK_NORM_ROPE as QK_NORM_ROPE, qk_norm_rope as qk_norm_rope
from .rotation import Rotation as Rotation
