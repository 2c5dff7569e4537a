"""Flash attention: `flash_attention`, its attention masks, and its kernel implementations."""

from .api import (
    FLASH_ATTENTION as FLASH_ATTENTION,
    flash_attention as flash_attention,
    merge_attention as merge_attention,
)
from .jvp import (
    FLASH_ATTENTION_TANGENT as FLASH_ATTENTION_TANGENT,
    flash_attention_jvp as flash_attention_jvp,
)
from .mask import AttentionMask as AttentionMask
