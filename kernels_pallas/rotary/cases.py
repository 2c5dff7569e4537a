"""Named cases of QK-norm and RoPE: tiny ones for interpret mode on a CPU, and the shapes of published models."""

import jax
import jax.numpy as jnp

from ..op import Case
from .rotation import Rotation


F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


def _case(
    B, T, N, K, H, dtype=BF16, *, weights=F32, turned: int | None = 1, interleaved=False, origin="", tiny=False
) -> Case:
    """A case; `turned` is the batch size of the rotation, or None without a rotation."""
    qkv = jax.ShapeDtypeStruct((B, T, K, N // K + 2, H), dtype)
    weight = None if weights is None else jax.ShapeDtypeStruct((H,), weights)
    table = jax.ShapeDtypeStruct((turned or 1, T, H // 2), F32)
    rotation = None if turned is None else Rotation(table, table)
    return Case((qkv, weight, weight, rotation), {"interleaved": interleaved, "eps": 1e-6}, origin, tiny)


CASES = {
    "tiny": _case(2, 16, 2, 2, 16, F32, tiny=True),
    "tiny_odd": _case(2, 37, 4, 2, 24, F32, turned=2, tiny=True, origin="T in two tiles, 12 pairs"),
    "tiny_h72": _case(3, 5, 2, 1, 72, BF16, weights=BF16, tiny=True),
    "tiny_pairs": _case(2, 7, 2, 2, 24, F32, interleaved=True, tiny=True),
    "tiny_pairs_f16": _case(2, 33, 6, 2, 16, F16, turned=2, interleaved=True, tiny=True),
    "tiny_norm": _case(2, 1, 2, 2, 24, BF16, turned=None, tiny=True),
    "tiny_turn": _case(2, 33, 2, 2, 16, BF16, weights=None, tiny=True),
    "tiny_split": _case(2, 3, 2, 2, 8, F32, weights=None, turned=None, tiny=True, origin="split only"),
    "dit_b_256": _case(64, 256, 12, 12, 64, weights=BF16, origin="DiT-B/2 with QK-norm, 256 px"),
    "dit_xl_256": _case(32, 256, 16, 16, 72, weights=BF16, origin="DiT-XL/2 with QK-norm, 256 px"),
    "dit_xl_257_f32": _case(16, 257, 16, 16, 72, F32, turned=16, origin="a class token before 256, float32 training"),
    "flux_1024": _case(4, 4608, 24, 24, 128, interleaved=True, origin="FLUX.1, 512 text tokens and 1024 px"),
    "bagel_gqa": _case(1, 16384, 28, 4, 128, turned=1, origin="BAGEL 7B, packed"),
    "wan_no_norm": _case(1, 8192, 40, 40, 128, weights=None, origin="Wan 14B's heads, RoPE only"),
}
