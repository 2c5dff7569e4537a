"""Named cases of the checksum: tiny ones, and parameters of published models as in a checkpoint."""

import jax
import jax.numpy as jnp

from ..op import Case


def _case(*shape, dtype=jnp.float32, start=None, whole=None, origin="", tiny=False) -> Case:
    arrays = (jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((len(shape),), jnp.int32))

    def make(key):
        x = jax.random.normal(key, shape, jnp.float32)
        x = x.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else (100 * x).astype(dtype)
        return x, jnp.array(start or [0] * len(shape), jnp.int32)

    return Case(arrays, {"whole": whole or shape}, origin, tiny, make)


STATE_DIGEST = {
    "tiny": _case(3, 64, tiny=True),
    "tiny_odd": _case(2, 3, 37, tiny=True),
    "tiny_vector": _case(13, dtype=jnp.int32, tiny=True),
    "tiny_bf16": _case(4, 24, dtype=jnp.bfloat16, tiny=True),
    "tiny_bytes": _case(5, 33, dtype=jnp.uint8, tiny=True),
    "tiny_piece": _case(2, 3, 16, start=(1, 2, 20), whole=(4, 6, 50), tiny=True),
    "dit_xl2_qkv": _case(28, 1152, 3456, origin="DiT-XL/2, QKV projections of all layers"),
    "dit_xl2_heads": _case(28, 1152, 48, 72, origin="DiT-XL/2, QKV projections, with heads of width 72"),
    "dit_xl2_bf16": _case(28, 1152, 3456, dtype=jnp.bfloat16, origin="DiT-XL/2, QKV projections in bfloat16"),
}
