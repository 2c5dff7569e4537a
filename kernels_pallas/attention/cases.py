"""Named cases of attention: tiny ones for interpret mode on a CPU, and the shapes of published models."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ..op import Case
from .mask import AttentionMask
from .reference import flash_attention


def _case(
    B, T, N, H, *, S=None, K=None, mask: Callable[[], AttentionMask] | None = None, sinks=False,
    dtype=jnp.float32, softcap=None, return_lse=False, origin="", tiny=False, huge=False,
) -> Case:  # fmt: skip
    """A case. `mask` is a function that is called when inputs are made; calling it at import would start JAX."""
    q = jax.ShapeDtypeStruct((B, T, N, H), dtype)
    kv = jax.ShapeDtypeStruct((B, S or T, K or N, H), dtype)
    sink = jax.ShapeDtypeStruct((N,), jnp.float32) if sinks else None
    shapes = (q, kv, kv, None if mask is None else jax.eval_shape(mask), sink)
    static = {"scale": None, "softcap": softcap, "return_lse": return_lse}
    return Case(shapes, static, origin, tiny, mask and functools.partial(_make, shapes, mask), huge)


def _make(shapes, mask, key):
    q, k, v, _, sinks = shapes
    q, k, v, sinks = Case((q, k, v, sinks)).random(key)
    return q, k, v, mask(), sinks


def _unified(lengths: list[tuple[int, int, int]], padding: int = 0) -> AttentionMask:
    """A mask of packed documents with lengths (text, image, text after it); the image is there noised and clean."""
    documents, spans, noise = [], [], []
    for number, (text, image, after) in enumerate(lengths):
        documents += [number] * (text + 2 * image + after)
        spans += [-1] * text + [2 * number] * image + [2 * number + 1] * image + [-1] * after
        noise += [False] * text + [True] * image + [False] * (image + after)
    documents, spans, noise = documents + [-1] * padding, spans + [-1] * padding, noise + [False] * padding
    return AttentionMask.unified(*(np.array([x]) for x in (documents, spans, noise)))


def _packed(*lengths: int, padding: int = 0, causal: bool = False) -> AttentionMask:
    documents = np.repeat([*range(len(lengths)), -1], [*lengths, padding])
    return AttentionMask.packed(documents[None], causal=causal)


def _mixed(*lengths: int) -> AttentionMask:
    """A mask of alternating text and images, with these lengths."""
    spans = np.repeat([-1 if i % 2 == 0 else i for i in range(len(lengths))], lengths)
    return AttentionMask.mixed(spans[None])


tiny = functools.partial(_case, tiny=True)
TINY = {
    "tiny_full_h64": tiny(2, 64, 2, 64, origin="lengths that are multiples of the tile"),
    "tiny_full_h72": tiny(2, 40, 2, 72, S=77, origin="DiT-XL's head width over 77 text tokens"),
    "tiny_causal_h64": tiny(1, 77, 2, 64, mask=lambda: AttentionMask.causal(77), origin="an odd length"),
    "tiny_causal_longer_keys": tiny(
        1, 33, 2, 64, S=77, mask=lambda: AttentionMask.causal(33, 77), origin="queries after a prefix"
    ),
    "tiny_causal_unseeing": tiny(
        1, 77, 2, 64, S=40, mask=lambda: AttentionMask.causal(77, 40), origin="queries without visible keys"
    ),
    "tiny_grouped_h128": tiny(
        2, 48, 4, 128, K=2, mask=lambda: AttentionMask.causal(48), origin="two query heads per key head"
    ),
    "tiny_one_query": tiny(2, 1, 2, 64, S=77, origin="one query"),
    "tiny_one_key": tiny(2, 77, 2, 64, S=1, origin="one key"),
    "tiny_padding": tiny(
        2, 40, 2, 64, S=50, mask=lambda: AttentionMask.padding(np.array([50, 13]), 40, 50), origin="padding mask"
    ),
    "tiny_unified_bf16_h72": tiny(
        1, 99, 4, 72, K=2, mask=lambda: _unified([(9, 16, 11), (3, 20, 2)], padding=2), dtype=jnp.bfloat16,
        origin="bfloat16 with packing, private keys, grouped queries and padding",
    ),
    "tiny_options": tiny(
        2, 40, 4, 32, K=2, mask=lambda: AttentionMask.sliding_window(40, left=9, right=4), sinks=True, softcap=3.0,
        return_lse=True, origin="soft cap, sinks and lse",
    ),
}  # fmt: skip


model = functools.partial(_case, dtype=jnp.bfloat16)
MODEL = {
    "dit_s2_256": model(64, 256, 6, 64, origin="DiT-S/2, 256 px: 32 x 32 latents in 2 x 2 patches"),
    "dit_b2_256": model(32, 256, 12, 64, origin="DiT-B/2, 256 px; also JiT-B/16, 256 px: pixels in 16 x 16 patches"),
    "dit_xl2_256": model(32, 256, 16, 72, origin="DiT-XL/2, 256 px"),
    "dit_xl2_512": model(8, 1024, 16, 72, origin="DiT-XL/2, 512 px"),
    "dit_xl2_text": model(32, 256, 16, 72, S=77, origin="DiT-XL/2, 256 px, reading 77 CLIP text tokens"),
    "jit_h16_256": model(32, 256, 16, 80, origin="JiT-H/16, 256 px: width 1280 in 16 heads"),
    "sd3_joint_1024": model(2, 4250, 24, 64, origin="SD3, 1024 px: 4,096 image and 154 text tokens together"),
    "flux_1024": model(1, 4608, 24, 128, origin="FLUX.1, 1024 px: 4,096 image and 512 text tokens"),
    "video_32k": model(1, 32760, 12, 128, huge=True, origin="Wan2.1-1.3B, 81 frames of 832 x 480: 21 x 30 x 52 tokens"),
    "llm_4k": model(
        1, 4096, 32, 128, K=8, mask=lambda: AttentionMask.causal(4096), origin="Llama-3-8B at 4,096 tokens"
    ),
    "packed_8k": model(
        1, 8192, 16, 72, mask=lambda: _packed(256, 1024, 576, 2304, 1600, 400, 1024, 784, padding=224),
        origin="DiT-XL/2 on images of eight sizes in one sequence, as NaViT packs them",
    ),
    "mixed_8k": model(
        1, 8192, 32, 128, K=8, mask=lambda: _mixed(512, 1024, 1024, 1024, 1536, 2048, 1024), huge=True,
        origin="text and three images, as Transfusion has them",
    ),
    "unified_32k": model(
        1, 32768, 28, 128, K=4, huge=True,
        mask=lambda: _unified([(512, 4096, 256)] * 3 + [(512, 2048, 256)], padding=1024),
        origin="BAGEL-7B: packed documents, each with the noised and the clean copy of an image",
    ),
}  # fmt: skip

CASES = {**TINY, **MODEL}

# The benchmark protocol of FlashAttention: 16,384 tokens per batch, model width 2,048 in heads of 64, 128 and 256.
SWEEP = {
    f"protocol_{length}_h{H}{suffix}": model(
        16384 // length, length, 2048 // H, H, mask=functools.partial(AttentionMask.causal, length) if suffix else None,
        origin="FlashAttention-3's benchmark: https://arxiv.org/abs/2407.08608, section 4.1",
    )
    for H in (64, 128, 256)
    for length in (512, 1024, 2048, 4096, 8192, 16384)
    for suffix in ("", "_causal")
}  # fmt: skip


def _tangent(case: Case) -> Case:
    """The case of the tangent op at a case of attention: adds the output, its lse, and tangents of q, k and v."""
    q, k, v, mask, _ = case.arrays
    lse = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    static = {name: case.static[name] for name in ("scale", "softcap")}
    shapes = (q, k, v, mask, q, lse, q, k, v)
    return Case(shapes, static, case.origin, case.tiny, functools.partial(_make_tangent, case, static))


def _make_tangent(case, static, key):
    key, key_tangent = jax.random.split(key)
    q, k, v, mask, _ = case.random(key)
    out, lse = flash_attention(q, k, v, mask, None, return_lse=True, **static)
    return q, k, v, mask, out, lse, *Case(case.arrays[:3]).random(key_tangent)


TANGENT_CASES = {
    name: _tangent(CASES[name])
    for name in (
        "tiny_full_h64", "tiny_full_h72", "tiny_causal_unseeing", "tiny_padding",
        "tiny_unified_bf16_h72", "dit_b2_256", "dit_xl2_256", "dit_xl2_text", "llm_4k", "packed_8k",
    )
}  # fmt: skip
TANGENT_CASES["tiny_bf16_h128"] = _tangent(tiny(1, 40, 2, 128, dtype=jnp.bfloat16, origin="the widest common head"))
TANGENT_CASES["tiny_softcap"] = _tangent(tiny(1, 40, 2, 32, softcap=3.0, origin="soft cap"))
