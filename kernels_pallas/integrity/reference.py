"""Reference implementation of the checksum in jnp; also implementation="xla"."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped, UInt32


def state_digest(x: Shaped[Array, "..."], start: Int[Array, " dims"], *, whole: tuple[int, ...]) -> UInt32[Array, " 4"]:
    """Four sums, modulo 2^32, over the 32-bit words of x; each word is hashed with its row and column in the array."""
    words, columns = _words(x)
    row = jnp.zeros((), jnp.uint32)
    for dim, size in enumerate(x.shape[:-1]):
        at = jnp.arange(size, dtype=jnp.uint32) + start[dim].astype(jnp.uint32)
        row = jnp.expand_dims(row * jnp.uint32(whole[dim]), -1) + jnp.expand_dims(at, range(dim))
    per = columns // max(x.shape[-1], 1)
    column = jnp.arange(columns, dtype=jnp.uint32) + start[-1].astype(jnp.uint32) * jnp.uint32(per)
    a = words ^ jnp.expand_dims(column * jnp.uint32(0x9E3779B1), range(row.ndim))
    a = (a ^ a >> 16) * jnp.uint32(0x7FEB352D)
    a = (a ^ a >> 15) + jnp.expand_dims(row * jnp.uint32(0x85EBCA77) + jnp.uint32(0x165667B1), -1)
    sums = []
    for factor, shift in ((0x846CA68B, 16), (0xC2B2AE3D, 15), (0x27D4EB2F, 16), (0x165667B1, 15)):
        a = a * jnp.uint32(factor)
        a = a ^ a >> shift
        sums.append(jnp.sum(a, dtype=jnp.uint32))
    return jnp.stack(sums)


def _words(x: jax.Array) -> tuple[jax.Array, int]:
    """(the bits of x as uint32 words, the number of words per row): one word per element, two per 64-bit element."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    if x.dtype.itemsize == 8:  # bitcasting 64 to 32 bits adds a last dim of size 2
        bits = bits.reshape(*x.shape[:-1], 2 * x.shape[-1])
    return bits.astype(jnp.uint32), bits.shape[-1]
