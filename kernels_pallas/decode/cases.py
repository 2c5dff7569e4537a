"""Named cases of decode attention: tiny ones for interpret mode on a CPU, and the KV caches of published models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ..op import Case


def _case(
    lengths: tuple[int, ...], S, N, K, H, *, page=None, dtype=jnp.float32, scale=None, softcap=None, origin="",
    tiny=False,
) -> Case:  # fmt: skip
    """A case with one example for each of `lengths` and a cache of S keys, paged if `page` is given."""
    B = len(lengths)
    q = jax.ShapeDtypeStruct((B, N, H), dtype)
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    if page is None:
        kv, table = jax.ShapeDtypeStruct((B, S, K, H), dtype), ()
    else:
        J = -(-S // page)
        kv, table = jax.ShapeDtypeStruct((B * J, page, K, H), dtype), (integers(B, J),)
    make = functools.partial(_make, (q, kv, kv), lengths, page)
    return Case((q, kv, kv, *table, integers(B)), {"scale": scale, "softcap": softcap}, origin, tiny, make)


def _make(shapes, lengths, page, key):
    """Random arrays, with pages in random order; unused entries of the block table are -1."""
    values = [np.array(lengths, np.int32)]
    if page is not None:
        B, P = len(lengths), shapes[1].shape[0]
        order = np.random.default_rng(0).permutation(P).reshape(B, P // B)
        needed = np.arange(P // B) * page < values[0][:, None]
        values.insert(0, np.where(needed, order, -1).astype(np.int32))
    return *Case(shapes).random(key), *map(jnp.asarray, values)


tiny = functools.partial(_case, tiny=True)
model = functools.partial(_case, dtype=jnp.bfloat16)
RAGGED = (32768, 24000, 12345, 8192, 4096, 1024, 77, 1)

CASES = {
    "tiny_h64": tiny((128, 64), 128, 2, 2, 64, origin="one query head per key head, caches full and half full"),
    "tiny_h72_odd": tiny((77, 40), 77, 4, 1, 72, origin="DiT-XL's head width; lengths that no tile divides"),
    "tiny_h128_g8": tiny((50, 0, 1), 77, 8, 1, 128, origin="eight query heads per key head; lengths 0 and 1"),
    "tiny_splits": tiny((700, 130), 700, 8, 2, 32, origin="several splits per example, some without keys"),
    "tiny_bf16": tiny((300, 299), 300, 8, 2, 128, dtype=jnp.bfloat16, origin="bfloat16"),
    "tiny_bf16_h72": tiny((77, 9), 77, 3, 1, 72, dtype=jnp.bfloat16, origin="a group that is no power of two"),
    "tiny_f16_softcap": tiny(
        (200, 3), 200, 4, 4, 64, dtype=jnp.float16, scale=0.5, softcap=3.0, origin="float16, all options"
    ),
    "tiny_one_slot": tiny((1, 0), 1, 2, 1, 64, origin="a cache of one key"),
    "llama3_8b_4k": model((4096,) * 8, 4096, 32, 8, 128, origin="Llama-3-8B at 4,096 tokens"),
    "llama3_8b_32k": model((32768,) * 8, 32768, 32, 8, 128, origin="Llama-3-8B at 32,768 tokens"),
    "llama3_8b_ragged": model(RAGGED, 32768, 32, 8, 128, origin="Llama-3-8B, requests of different lengths"),
    "unified_7b_32k": model((32768,), 32768, 28, 4, 128, origin="BAGEL-7B, one user at 32,768 tokens"),
    "llama2_7b_4k": model((4096,) * 8, 4096, 32, 32, 128, origin="Llama-2-7B: as many key as query heads"),
    "gemma2_9b_8k": model((8192,) * 8, 8192, 16, 8, 256, softcap=50.0, origin="Gemma-2-9B: wide heads, soft cap"),
}

PAGED_CASES = {
    "tiny_pages": tiny((150, 33), 160, 2, 2, 64, page=32, origin="pages in a random order"),
    "tiny_h72_odd": tiny((77, 40), 96, 4, 1, 72, page=16, origin="DiT-XL's head width; a partial last page"),
    "tiny_h128_g8": tiny((50, 0, 1), 128, 8, 1, 128, page=64, origin="eight query heads per key head; lengths 0, 1"),
    "tiny_bf16": tiny((300, 299), 304, 8, 2, 128, page=16, dtype=jnp.bfloat16, origin="bfloat16"),
    "tiny_f16": tiny((256, 17), 256, 4, 1, 64, page=128, dtype=jnp.float16, softcap=3.0, origin="large pages"),
    "llama3_8b_4k": model((4096,) * 8, 4096, 32, 8, 128, page=16, origin="Llama-3-8B, 4,096 tokens, vLLM's page"),
    "llama3_8b_32k": model((32768,) * 8, 32768, 32, 8, 128, page=64, origin="Llama-3-8B at 32,768 tokens"),
    "llama3_8b_ragged": model(RAGGED, 32768, 32, 8, 128, page=16, origin="Llama-3-8B, requests of different lengths"),
    "unified_7b_32k": model((32768,), 32768, 28, 4, 128, page=256, origin="BAGEL-7B, one user at 32,768 tokens"),
}
