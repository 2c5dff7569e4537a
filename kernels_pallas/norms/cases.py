"""Sizes that tests, benchmarks and the inspector run."""

import jax
import jax.numpy as jnp

from ..op import Case


def _case(B, T, D, kind, dtype=jnp.bfloat16, modulation=None, *, origin="", tiny=False) -> Case:
    x = jax.ShapeDtypeStruct((B, T, D), dtype)
    scale = jax.ShapeDtypeStruct((B, D), modulation or dtype)
    return Case((x, scale, scale), {"kind": kind, "eps": 1e-6}, origin, tiny)


CASES = {
    "tiny_layer": _case(2, 16, 64, "layer", jnp.float32, tiny=True),
    "tiny_layer_odd": _case(3, 37, 72, "layer", jnp.float32, tiny=True, origin="T in two tiles, neither full"),
    "tiny_layer_bf16": _case(2, 7, 48, "layer", tiny=True),
    "tiny_layer_mixed": _case(2, 5, 72, "layer", jnp.bfloat16, jnp.float32, tiny=True),
    "tiny_rms": _case(2, 1, 48, "rms", jnp.float32, tiny=True, origin="one row"),
    "tiny_rms_f16": _case(2, 33, 72, "rms", jnp.float16, tiny=True),
    "dit_s_256": _case(64, 256, 384, "layer", origin="DiT-S/2, 256 px"),
    "dit_b_256": _case(64, 256, 768, "rms", origin="DiT-B/2 with RMSNorm, 256 px"),
    "dit_xl_256": _case(32, 256, 1152, "layer", origin="DiT-XL/2, 256 px"),
    "dit_xl_256_f32": _case(32, 256, 1152, "layer", jnp.float32, origin="DiT-XL/2, 256 px, float32 training"),
    "flux_1024": _case(4, 4096, 3072, "rms", jnp.bfloat16, jnp.float32, origin="FLUX.1, 1024 px"),
    "wide": _case(2, 4096, 8192, "layer", origin="the widest row the kernels take"),
    "wide_f32": _case(1, 4096, 8192, "layer", jnp.float32, origin="the widest row the kernels take"),
}
