"""Named cases of secure noise: tiny ones, and gradients of the parameters of published models."""

import jax
import jax.numpy as jnp

from ..op import Case


def _case(*shape, start=None, whole=None, stddev=1.0, origin="", tiny=False) -> Case:
    words = [jax.ShapeDtypeStruct((n,), jnp.uint32) for n in (8, 3)]
    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32), *words, jax.ShapeDtypeStruct((len(shape),), jnp.int32))

    def make(key):
        of_x, of_key, of_nonce = jax.random.split(key, 3)
        key, nonce = jax.random.bits(of_key, (8,), jnp.uint32), jax.random.bits(of_nonce, (3,), jnp.uint32)
        at = jnp.array(start or [0] * len(shape), jnp.int32)
        return jax.random.normal(of_x, shape, jnp.float32), key, nonce, at

    return Case(arrays, {"stddev": stddev, "whole": whole or shape}, origin, tiny, make)


SECURE_NORMAL = {
    "tiny": _case(3, 64, tiny=True),
    "tiny_odd": _case(2, 3, 37, stddev=0.5, tiny=True, origin="a partial last block in each row"),
    "tiny_vector": _case(13, tiny=True),
    "tiny_piece": _case(2, 3, 17, start=(1, 2, 21), whole=(4, 6, 50), tiny=True, origin="starts inside a block"),
    "dit_xl2_qkv": _case(28, 1152, 3456, origin="DiT-XL/2, QKV projections of all layers"),
    "dit_xl2_bias": _case(28, 6912, origin="DiT-XL/2, adaLN biases of all layers"),
    "dit_xl2_piece": _case(28, 144, 3456, start=(0, 288, 0), whole=(28, 1152, 3456), origin="an eighth of these"),
}
