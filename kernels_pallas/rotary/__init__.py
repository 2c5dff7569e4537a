"""Queries and keys as attention wants them: normalised, and turned by their positions."""

from .api import QK_NORM_ROPE as QK_NORM_ROPE, qk_norm_rope as qk_norm_rope
from .rotation import Rotation as Rotation
