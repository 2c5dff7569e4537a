"""Named cases of the norms: tiny ones for interpret mode on a CPU, and the shapes of published models."""

import jax
import jax.numpy as jnp

from ..op import Case


def _case(B, T, D, kind, dtype=jnp.bfloat16, modulation=None, *, by="B", weight=None, origin="", tiny=False) -> Case:
    """A case whose scale and shift are per example (by="B"), per token ("BT"), or absent ("")."""
    modulated = {"B": (B, D), "BT": (B, T, D)}.get(by)
    scale = None if modulated is None else jax.ShapeDtypeStruct(modulated, modulation or dtype)
    weight = None if weight is None else jax.ShapeDtypeStruct((D,), weight)
    arrays = (jax.ShapeDtypeStruct((B, T, D), dtype), scale, scale, weight)
    return Case(arrays, {"kind": kind, "eps": 1e-6}, origin, tiny)


F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
WIDEST = "the widest row that the kernels support"

NORM_CASES = {
    "tiny_layer": _case(2, 16, 64, "layer", F32, tiny=True),
    "tiny_layer_odd": _case(3, 37, 72, "layer", F32, tiny=True, origin="T in two tiles, both partial"),
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
    "narrow_1": _case(4096, 1, 448, "rms", origin="one token per example"),
    "wan_tokens": _case(1, 8192, 5120, "layer", BF16, F32, by="BT", origin="Wan 2.2 14B's width, a timestep per token"),
    "flux_1024": _case(4, 4096, 3072, "rms", BF16, F32, origin="FLUX.1, 1024 px"),
    "wide": _case(2, 4096, 8192, "layer", origin=WIDEST),
    "wide_f32": _case(1, 4096, 8192, "layer", F32, origin=WIDEST),
}


def _residual(B, T, D, kind, dtype=BF16, modulation=None, *, gate=None, **options) -> Case:
    """A case with a branch and a gate; the gate is per example or per token as scale and shift, or as `gate` says."""
    norm = _case(B, T, D, kind, dtype, modulation, **options)
    x, scale, shift, weight = norm.arrays
    shape = (B, T, D) if (gate or options.get("by", "B")) == "BT" else (B, D)
    gated = jax.ShapeDtypeStruct(shape, modulation or dtype)
    return Case((x, x, gated, scale, shift, weight), norm.static, norm.origin, norm.tiny)


RESIDUAL_CASES = {
    "tiny_layer_odd": _residual(3, 37, 72, "layer", F32, tiny=True, origin="T in two tiles, both partial"),
    "tiny_layer_mixed": _residual(2, 5, 72, "layer", BF16, F32, tiny=True),
    "tiny_layer_alone": _residual(2, 9, 40, "layer", F32, by="", tiny=True),
    "tiny_rms_tokens": _residual(2, 33, 48, "rms", F32, by="BT", weight=F32, tiny=True),
    "tiny_rms_f16": _residual(2, 257, 24, "rms", F16, tiny=True),
    "tiny_rms_one": _residual(2, 1, 48, "rms", BF16, weight=BF16, gate="BT", tiny=True, origin="one row"),
    "dit_b_256": _residual(64, 256, 768, "rms", origin="DiT-B/2 with RMSNorm, 256 px"),
    "dit_xl_256": _residual(32, 256, 1152, "layer", origin="DiT-XL/2, 256 px"),
    "dit_xl_512": _residual(8, 1024, 1152, "layer", origin="DiT-XL/2, 512 px"),
    "sdxl_tokens": _residual(32, 257, 1408, "layer", by="BT", origin="a gate for each of 257 tokens, ViT-g's width"),
    "narrow_1": _residual(4096, 1, 448, "rms", origin="one token per example"),
    "flux_1024": _residual(4, 4096, 3072, "rms", BF16, F32, origin="FLUX.1, 1024 px"),
    "wide": _residual(2, 4096, 8192, "layer", origin=WIDEST),
    "wide_f32": _residual(1, 4096, 8192, "layer", F32, origin=WIDEST),
}
