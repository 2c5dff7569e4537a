"""Named cases of the MLPs: tiny ones for interpret mode on a CPU, and the shapes of published models."""

import jax
import jax.numpy as jnp

from ..op import Case


F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


def _case(R, D, F, activation, dtype=BF16, *, gated: bool, origin="", tiny=False) -> Case:
    shapes = [(R, D), (D, 2, F), (F, D)] if gated else [(R, D), (D, F), (F,), (F, D), (D,)]
    arrays = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def make(key):
        """Standard normal inputs; matrices are scaled by fan-in, so that the activations are near one."""
        keys = jax.random.split(key, len(shapes))
        size = lambda shape, i: shape[0] ** -0.5 if i and len(shape) > 1 else 1.0
        return tuple((jax.random.normal(k, shape) * size(shape, i)).astype(dtype)
                     for i, (k, shape) in enumerate(zip(keys, shapes, strict=True)))  # fmt: skip

    return Case(arrays, {"activation": activation}, origin, tiny, make)


GATED_CASES = {
    "tiny": _case(32, 32, 64, "silu", F32, gated=True, tiny=True),
    "tiny_odd": _case(37, 72, 56, "silu", F32, gated=True, tiny=True, origin="partial tiles in all dims"),
    "tiny_halves": _case(
        16, 64, 200, "gelu_tanh", F32, gated=True, tiny=True, origin="the last column tile is half empty"
    ),
    "tiny_bf16": _case(130, 64, 96, "silu", BF16, gated=True, tiny=True),
    "tiny_f16": _case(16, 48, 48, "gelu_tanh", F16, gated=True, tiny=True),
    "dit_b_256": _case(16384, 768, 2048, "silu", gated=True, origin="DiT-B/2 with SwiGLU, 64 images of 256 px"),
    "dit_xl_256": _case(8192, 1152, 3072, "silu", gated=True, origin="DiT-XL/2 with SwiGLU, 32 images of 256 px"),
    "dit_xl_f32": _case(4096, 1152, 3072, "silu", F32, gated=True, origin="DiT-XL/2, 16 images, float32 training"),
    "lumina_2": _case(4096, 2304, 9216, "silu", gated=True, origin="Lumina-Image 2.0, 1024 px"),
    "bagel_7b": _case(8192, 3584, 18944, "silu", gated=True, origin="BAGEL 7B"),
}
DENSE_CASES = {
    "tiny": _case(32, 32, 64, "gelu_tanh", F32, gated=False, tiny=True),
    "tiny_odd": _case(37, 72, 56, "gelu_tanh", F32, gated=False, tiny=True, origin="partial tiles in all dims"),
    "tiny_bf16": _case(130, 64, 192, "gelu_tanh", BF16, gated=False, tiny=True),
    "tiny_silu": _case(16, 48, 40, "silu", F16, gated=False, tiny=True),
    "dit_s_256": _case(16384, 384, 1536, "gelu_tanh", gated=False, origin="DiT-S/2, 64 images of 256 px"),
    "dit_xl_256": _case(8192, 1152, 4608, "gelu_tanh", gated=False, origin="DiT-XL/2, 32 images of 256 px"),
    "flux_1024": _case(4096, 3072, 12288, "gelu_tanh", gated=False, origin="FLUX.1, 1024 px"),
    "wan_14b": _case(8192, 5120, 13824, "gelu_tanh", gated=False, origin="Wan 2.1 14B"),
}
