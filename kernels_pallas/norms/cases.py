"""Sizes that tests, benchmarks and the inspector run."""

import jax
import jax.numpy as jnp

from ..op import Case


def _case(B, T, D, kind, dtype=jnp.bfloat16, modulation=None, *, by="B", weight=None, origin="", tiny=False) -> Case:
    """`by` which scale and shift differ: "B" examples, "BT" tokens, "" not at all, for there are none."""
    modulated = {"B": (B, D), "BT": (B, T, D)}.get(by)
    scale = None if modulated is None else jax.ShapeDtypeStruct(modulated, modulation or dtype)
    weight = None if weight is None else jax.ShapeDtypeStruct((D,), weight)
    arrays = (jax.ShapeDtypeStruct((B, T, D), dtype), scale, scale, weight)
    return Case(arrays, {"kind": kind, "eps": 1e-6}, origin, tiny)


F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
WIDEST = "the widest row the kernels take"

NORM_CASES = {
    "tiny_layer": _case(2, 16, 64, "layer", F32, tiny=True),
    "tiny_layer_odd": _case(3, 37, 72, "layer", F32, tiny=True, origin="T in two tiles, neither full"),
    "tiny_layer_bf16": _case(2, 7, 48, "layer", tiny=True),
    "tiny_layer_mixed": _case(2, 5, 72, "layer", BF16, F32, tiny=True),
    "tiny_layer_tokens": _case(2, 37, 72, "layer", F32, by="BT", weight=F32, tiny=True),
    "tiny_layer_alone": _case(2, 9, 40, "layer", F32, by="", tiny=True),
    "tiny_rms": _case(2, 1, 48, "rms", F32, tiny=True, origin="one row"),
    "tiny_rms_f16": _case(2, 33, 72, "rms", F16, tiny=True),
    "tiny_rms_weight": _case(2, 257, 24, "rms", BF16, by="", weight=F32, tiny=True),
    "tiny_rms_weighted": _case(2, 33, 48, "rms", BF16, F32, weight=F32, tiny=True),
    "tiny_rms_tokens": _case(2, 33, 48, "rms", BF16, by="BT", tiny=True),
    "dit_s_256": _case(64, 256, 384, "layer", origin="DiT-S/2, 256 px"),
    "dit_b_256": _case(64, 256, 768, "rms", origin="DiT-B/2 with RMSNorm, 256 px"),
    "dit_xl_256": _case(32, 256, 1152, "layer", origin="DiT-XL/2, 256 px"),
    "dit_xl_256_f32": _case(32, 256, 1152, "layer", F32, origin="DiT-XL/2, 256 px, float32 training"),
    "so400m_448": _case(16, 1024, 1152, "layer", by="", weight=F32, origin="tokens of a ViT SO400M, 448 px"),
    "sdxl_tokens": _case(32, 257, 1408, "layer", by="BT", origin="a scale for each of 257 tokens, ViT-g's width"),
    "narrow_1": _case(4096, 1, 448, "rms", origin="one token an example"),
    "wan_tokens": _case(1, 8192, 5120, "layer", BF16, F32, by="BT", origin="Wan 2.2 14B's width, a time a token"),
    "flux_1024": _case(4, 4096, 3072, "rms", BF16, F32, origin="FLUX.1, 1024 px"),
    "wide": _case(2, 4096, 8192, "layer", origin=WIDEST),
    "wide_f32": _case(1, 4096, 8192, "layer", F32, origin=WIDEST),
}


def _residual(B, T, D, kind, dtype=BF16, modulation=None, *, gate=None, **options) -> Case:
    """The same with a branch and a gate, which differs as scale and shift do, or as `gate` says."""
    norm = _case(B, T, D, kind, dtype, modulation, **options)
    x, scale, shift, weight = norm.arrays
    shape = (B, T, D) if (gate or options.get("by", "B")) == "BT" else (B, D)
    gated = jax.ShapeDtypeStruct(shape, modulation or dtype)
    return Case((x, x, gated, scale, shift, weight), norm.static, norm.origin, norm.tiny)


RESIDUAL_CASES = {
    "tiny_layer_odd": _residual(3, 37, 72, "layer", F32, tiny=True, origin="T in two tiles, neither full"),
    "tiny_layer_mixed": _residual(2, 5, 72, "layer", BF16, F32, tiny=True),
    "tiny_layer_alone": _residual(2, 9, 40, "layer", F32, by="", tiny=True),
    "tiny_rms_tokens": _residual(2, 33, 48, "rms", F32, by="BT", weight=F32, tiny=True),
    "tiny_rms_f16": _residual(2, 257, 24, "rms", F16, tiny=True),
    "tiny_rms_one": _residual(2, 1, 48, "rms", BF16, weight=BF16, gate="BT", tiny=True, origin="one row"),
    "dit_b_256": _residual(64, 256, 768, "rms", origin="DiT-B/2 with RMSNorm, 256 px"),
    "dit_xl_256": _residual(32, 256, 1152, "layer", origin="DiT-XL/2, 256 px"),
    "dit_xl_512": _residual(8, 1024, 1152, "layer", origin="DiT-XL/2, 512 px"),
    "sdxl_tokens": _residual(32, 257, 1408, "layer", by="BT", origin="a gate for each of 257 tokens, ViT-g's width"),
    "narrow_1": _residual(4096, 1, 448, "rms", origin="one token an example"),
    "flux_1024": _residual(4, 4096, 3072, "rms", BF16, F32, origin="FLUX.1, 1024 px"),
    "wide": _residual(2, 4096, 8192, "layer", origin=WIDEST),
    "wide_f32": _residual(1, 4096, 8192, "layer", F32, origin=WIDEST),
}
