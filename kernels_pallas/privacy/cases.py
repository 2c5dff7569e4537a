"""Named cases of the DP-SGD kernels: linear layers of diffusion transformers, and tiny ones for interpret mode."""

import functools

import jax
import jax.numpy as jnp

from ..op import Case


F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


def _arrays(B, T, D, F, dtype) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((B, T, width), dtype) for width in (D, F)]


def _norm(B, T, D, F, dtype=BF16, *, groups=None, bias=False, origin="", tiny=False) -> Case:
    """A case; `groups` is the number of experts. With groups, a tenth of the rows is padding, filled with NaN."""
    arrays = _arrays(B, T, D, F, dtype)
    make = None if groups is None else functools.partial(_grouped, arrays, groups, origin == "unsorted")
    of_rows = None if groups is None else jax.ShapeDtypeStruct((B, T), jnp.int32)
    return Case((*arrays, of_rows), {"bias": bias}, origin, tiny, make)


def _grouped(arrays, groups: int, unsorted: bool, key):
    """Rows sorted by expert, as the MoE kernels have them, with padding rows last."""
    key, of_group, of_absent = jax.random.split(key, 3)
    shape = arrays[0].shape[:2]
    group = jax.random.randint(of_group, shape, 0, groups, jnp.int32)
    group = jnp.where(jax.random.uniform(of_absent, shape) < 0.1, groups, group)
    group = group if unsorted else jnp.sort(group, axis=1)
    group = jnp.where(group == groups, -1, group)
    a, g = (jnp.where(group[:, :, None] < 0, jnp.array(jnp.nan, x.dtype), x) for x in Case(tuple(arrays)).random(key))
    return a, g, group


def _clip(B, T, D, F, dtype=BF16, *, origin="", tiny=False) -> Case:
    """A case in which every third example, from the second on, is padding: its factor is 0 and its values are NaN."""
    arrays = _arrays(B, T, D, F, dtype)

    def make(key):
        key, of_c = jax.random.split(key)
        a, g = Case(tuple(arrays)).random(key)
        padding = jnp.arange(B, dtype=jnp.int32) % 3 == 1
        a, g = (jnp.where(padding[:, None, None], jnp.array(jnp.nan, x.dtype), x) for x in (a, g))
        return a, g, jnp.where(padding, 0, jax.random.uniform(of_c, (B,)))

    return Case((*arrays, jax.ShapeDtypeStruct((B,), jnp.float32)), {}, origin, tiny, make)


ORIGINS = {
    "dit_b2_qkv": "DiT-B/2, QKV projection, 32 images of 256 px",
    "dit_b2_up": "DiT-B/2, MLP up projection, 32 images of 256 px",
    "dit_xl2_qkv": "DiT-XL/2, QKV projection, 32 images of 256 px",
    "dit_xl2_up": "DiT-XL/2, MLP up projection, 16 images of 256 px",
    "dit_xl2_down": "DiT-XL/2, MLP down projection, 32 images of 256 px",
    "dit_xl2_1024_out": "DiT-XL/2, attention output projection, 16 images of 512 px",
    "dit_s2_1024_up": "DiT-S/2, MLP up projection, 16 images of 512 px",
    "lora_r16": "DiT-XL/2, LoRA of rank 16, first matrix, 32 images of 256 px",
    "adaln": "DiT-XL/2, adaLN modulation: one row per image",
    "dit_b2_f32": "DiT-B/2, attention output projection in float32, 16 images of 256 px",
}

tiny_norm = functools.partial(_norm, tiny=True)
GHOST_NORM_SQ = {
    "tiny": tiny_norm(3, 32, 32, 48, F32, origin="by matrix"),
    "tiny_odd": tiny_norm(2, 37, 24, 40, F32, bias=True, origin="partial tiles in all dims"),
    "tiny_pairs": tiny_norm(2, 37, 136, 200, F32, bias=True, origin="by pairs, one tile"),
    "tiny_pairs_bf16": tiny_norm(2, 130, 208, 264, origin="three tiles, the last nearly empty"),
    "tiny_pairs_even": tiny_norm(1, 256, 328, 336, bias=True, origin="an even number of tiles"),
    "tiny_bf16": tiny_norm(2, 70, 72, 136, bias=True),
    "tiny_f16": tiny_norm(2, 20, 16, 300, F16, origin="two column tiles"),
    "tiny_groups": tiny_norm(3, 37, 24, 40, F32, groups=4, bias=True, origin="unsorted"),
    "tiny_groups_sorted": tiny_norm(2, 150, 24, 40, F32, groups=3, origin="tiles without a pair of one group"),
    "tiny_groups_bf16": tiny_norm(2, 150, 40, 72, groups=5, bias=True),
    "tiny_one_row": tiny_norm(3, 1, 24, 40, F32, bias=True, origin="one row per example: XLA only"),
    "dit_b2_qkv": _norm(32, 256, 768, 2304, bias=True, origin=ORIGINS["dit_b2_qkv"]),
    "dit_b2_up": _norm(32, 256, 768, 3072, bias=True, origin=ORIGINS["dit_b2_up"]),
    "dit_xl2_qkv": _norm(32, 256, 1152, 3456, bias=True, origin=ORIGINS["dit_xl2_qkv"]),
    "dit_xl2_up": _norm(16, 256, 1152, 4608, bias=True, origin=ORIGINS["dit_xl2_up"]),
    "dit_xl2_down": _norm(32, 256, 4608, 1152, bias=True, origin=ORIGINS["dit_xl2_down"]),
    "dit_xl2_1024_out": _norm(16, 1024, 1152, 1152, bias=True, origin=ORIGINS["dit_xl2_1024_out"]),
    "dit_s2_1024_up": _norm(16, 1024, 384, 1536, bias=True, origin=ORIGINS["dit_s2_1024_up"]),
    "lora_r16": _norm(32, 256, 1152, 16, origin=ORIGINS["lora_r16"]),
    "dit_moe_xl_up": _norm(16, 512, 1152, 9216, groups=8, origin="DiT-MoE-XL/2-8E2A, gate and up of 16 images"),
    "dit_moe_xl_down": _norm(32, 512, 4608, 1152, groups=8, origin="DiT-MoE-XL/2-8E2A, down of 32 images"),
    "adaln": _norm(256, 1, 1152, 6912, bias=True, origin=ORIGINS["adaln"]),
    "dit_b2_f32": _norm(16, 256, 768, 768, F32, bias=True, origin=ORIGINS["dit_b2_f32"]),
}

tiny_clip = functools.partial(_clip, tiny=True)
CLIP_REDUCE = {
    "tiny": tiny_clip(3, 32, 32, 48, F32),
    "tiny_odd": tiny_clip(5, 37, 24, 40, F32, origin="partial tiles in all dims"),
    "tiny_one_row": tiny_clip(6, 1, 24, 136, F32, origin="one row per example, as in adaLN"),
    "tiny_splits": tiny_clip(7, 300, 16, 24, F32, origin="four programs share seven examples"),
    "tiny_bf16": tiny_clip(4, 70, 136, 72),
    "tiny_f16": tiny_clip(3, 20, 16, 300, F16, origin="three column tiles"),
    "dit_b2_qkv": _clip(32, 256, 768, 2304, origin=ORIGINS["dit_b2_qkv"]),
    "dit_b2_up": _clip(32, 256, 768, 3072, origin=ORIGINS["dit_b2_up"]),
    "dit_xl2_qkv": _clip(32, 256, 1152, 3456, origin=ORIGINS["dit_xl2_qkv"]),
    "dit_xl2_up": _clip(16, 256, 1152, 4608, origin=ORIGINS["dit_xl2_up"]),
    "dit_xl2_down": _clip(32, 256, 4608, 1152, origin=ORIGINS["dit_xl2_down"]),
    "dit_s2_1024_up": _clip(16, 1024, 384, 1536, origin=ORIGINS["dit_s2_1024_up"]),
    "lora_r16": _clip(32, 256, 1152, 16, origin=ORIGINS["lora_r16"]),
    "adaln": _clip(256, 1, 1152, 6912, origin=ORIGINS["adaln"]),
    "dit_b2_f32": _clip(16, 256, 768, 768, F32, origin=ORIGINS["dit_b2_f32"]),
}
