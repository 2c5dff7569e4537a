"""Decode attention: one query token per example against a KV cache, contiguous or paged."""

from .api import (
    DECODE_ATTENTION as DECODE_ATTENTION,
    PAGED_DECODE_ATTENTION as PAGED_DECODE_ATTENTION,
    decode_attention as decode_attention,
    paged_decode_attention as paged_decode_attention,
)
