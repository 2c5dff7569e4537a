"""Attention of one new token an example to the keys and values cached before it: what generation repeats."""

from .api import (
    DECODE_ATTENTION as DECODE_ATTENTION,
    PAGED_DECODE_ATTENTION as PAGED_DECODE_ATTENTION,
    decode_attention as decode_attention,
    paged_decode_attention as paged_decode_attention,
)
