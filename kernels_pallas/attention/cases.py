"""Named attention shapes: tiny ones that a CPU interprets in a second or two, and those of models."""

import jax
import jax.numpy as jnp

from ..op import Case


def _case(B, T, N, H, *, S=None, K=None, causal=False, dtype=jnp.float32, origin="", tiny=False) -> Case:
    q = jax.ShapeDtypeStruct((B, T, N, H), dtype)
    kv = jax.ShapeDtypeStruct((B, S or T, K or N, H), dtype)
    return Case((q, kv, kv), {"causal": causal, "scale": None}, origin, tiny)


TINY = {
    "tiny_full_h64": _case(2, 64, 2, 64, origin="a tile that nothing hangs over", tiny=True),
    "tiny_full_h72": _case(2, 40, 2, 72, S=77, origin="DiT-XL's head width over 77 text tokens", tiny=True),
    "tiny_causal_h64": _case(1, 77, 2, 64, causal=True, origin="an odd length under the diagonal", tiny=True),
    "tiny_causal_longer_keys": _case(1, 33, 2, 64, S=77, causal=True, origin="queries after a prefix", tiny=True),
    "tiny_causal_unseeing": _case(1, 77, 2, 64, S=40, causal=True, origin="queries that see nothing", tiny=True),
    "tiny_grouped_h128": _case(2, 48, 4, 128, K=2, causal=True, origin="two query heads a key head", tiny=True),
    "tiny_one_query": _case(2, 1, 2, 64, S=77, origin="one query", tiny=True),
    "tiny_one_key": _case(2, 77, 2, 64, S=1, origin="one key", tiny=True),
    "tiny_bf16_h72": _case(
        1, 77, 4, 72, K=2, causal=True, dtype=jnp.bfloat16, origin="the model dtype, all at once", tiny=True
    ),
}


def _model(*shape, **options) -> Case:
    return _case(*shape, dtype=jnp.bfloat16, **options)


MODEL = {
    "dit_b2_256": _model(32, 256, 12, 64, origin="DiT-B/2, 256 px: 32 x 32 latents in 2 x 2 patches"),
    "dit_xl2_256": _model(32, 256, 16, 72, origin="DiT-XL/2, 256 px"),
    "dit_xl2_512": _model(8, 1024, 16, 72, origin="DiT-XL/2, 512 px"),
    "dit_xl2_text": _model(
        32, 256, 16, 72, S=77, origin="DiT-XL/2, 256 px, reading 77 CLIP text tokens (cross-attention)"
    ),
    "flux_1024": _model(1, 4096, 24, 128, origin="FLUX.1, 1024 px: 64 x 64 image tokens"),
    "llm_4k": _model(
        1, 4096, 32, 128, K=8, causal=True, origin="Llama-3-8B at 4,096 tokens: 32 query heads on 8 key heads"
    ),
}

CASES = {**TINY, **MODEL}
