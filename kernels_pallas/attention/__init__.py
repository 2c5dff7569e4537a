"""Attention: `flash_attention` and its table of implementations."""

from .api import FLASH_ATTENTION as FLASH_ATTENTION, flash_attention as flash_attention
