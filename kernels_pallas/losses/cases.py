"""Named cases of the loss: tiny ones for interpret mode on a CPU, and the shapes of published models."""

import jax
import jax.numpy as jnp

from ..op import Case


F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
IGNORED = -100


def _case(R, D, V, dtype=BF16, *, z_loss=0.0, softcap=None, ignored=0.0, origin="", tiny=False, huge=False) -> Case:
    """A case; `ignored` is the share of rows whose label is ignore_index."""
    arrays = tuple(jax.ShapeDtypeStruct(*a) for a in (((R, D), dtype), ((D, V), dtype), ((R,), jnp.int32)))

    def make(key):
        """Logits of size one to four, as those of a trained model."""
        of_x, of_w, of_label, of_ignored = jax.random.split(key, 4)
        labels = jax.random.randint(of_label, (R,), 0, V, jnp.int32)
        labels = jnp.where(jax.random.uniform(of_ignored, (R,)) < ignored, IGNORED, labels)
        w = 2 * D**-0.5 * jax.random.normal(of_w, (D, V))
        return jax.random.normal(of_x, (R, D)).astype(dtype), w.astype(dtype), labels

    static = {"ignore_index": IGNORED, "z_loss": z_loss, "logit_softcap": softcap}
    return Case(arrays, static, origin, tiny, make, huge)


CASES = {
    "tiny": _case(32, 32, 128, F32, tiny=True),
    "tiny_odd": _case(37, 40, 300, F32, z_loss=1e-2, ignored=0.3, tiny=True, origin="partial tiles in all dims"),
    "tiny_softcap": _case(17, 24, 72, F32, z_loss=1e-2, softcap=3.0, ignored=0.3, tiny=True),
    "tiny_bf16": _case(130, 64, 520, BF16, z_loss=1e-4, tiny=True),
    "tiny_f16_softcap": _case(20, 48, 136, F16, softcap=30.0, ignored=0.5, tiny=True),
    "tiny_ignored": _case(8, 16, 16, F32, ignored=1.1, tiny=True, origin="all rows are ignored"),
    "janus_pro_1b": _case(8192, 2048, 16384, z_loss=1e-4, origin="Janus-Pro 1B's image tokens"),
    "gemma_2b": _case(4096, 2304, 256000, softcap=30.0, origin="Gemma 2 2B: the largest vocabulary, and a soft cap"),
    "bagel_7b": _case(8192, 3584, 152064, ignored=0.5, origin="BAGEL 7B, half are image tokens", huge=True),
    "v128k": _case(8192, 4096, 131072, origin="Llama 3 8B's width, a vocabulary of 128 k"),
    "janus_f32": _case(1024, 2048, 16384, F32, origin="Janus-Pro 1B in float32"),
}
