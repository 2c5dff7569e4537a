"""Reference implementation of secure noise in jnp: ChaCha20, and the inverse normal distribution function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from .segments import segments


PER_BLOCK = 8  # numbers per block of 512 bits
CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"


def secure_normal(
    x: Float[Array, "..."],
    key: UInt32[Array, " 8"],
    nonce: UInt32[Array, " 3"],
    start: Int[Array, " dims"],
    *,
    stddev: float,
    whole: tuple[int, ...],
) -> Float[Array, "..."]:
    """x + stddev n. Column c of row r of the whole array, with C columns, uses block r ceil(C / 8) + c // 8."""
    *of_rows, columns = x.shape
    row = jnp.zeros((), jnp.uint32)
    for dim, size in enumerate(of_rows):
        at = jnp.arange(size, dtype=jnp.uint32) + start[dim].astype(jnp.uint32)
        row = jnp.expand_dims(row * jnp.uint32(whole[dim]), -1) + jnp.expand_dims(at, range(dim))
    first = start[-1].astype(jnp.uint32)
    met = first // PER_BLOCK + jnp.arange(columns // PER_BLOCK + 2, dtype=jnp.uint32)  # blocks of a row
    begin = jnp.expand_dims(row * jnp.uint32(-(-whole[-1] // PER_BLOCK)), -1)
    counters = begin + jnp.expand_dims(met, range(row.ndim))
    words = chacha20(key, counters.reshape(-1), nonce)
    numbers = normals(words[:, 1::2], words[:, 0::2]).reshape(*of_rows, -1)
    drawn = jax.lax.dynamic_slice_in_dim(numbers, (first % PER_BLOCK).astype(jnp.int32), columns, axis=-1)
    return x + jnp.float32(stddev) * drawn


def secure_normal_backward(residuals, d_out, **static):
    """d_x = d_out: the noise does not depend on x."""
    del residuals, static
    return d_out, None, None, None


def chacha20(
    key: UInt32[Array, " 8"], counters: UInt32[Array, " num"], nonce: UInt32[Array, " 3"]
) -> UInt32[Array, "num 16"]:
    """The ChaCha20 blocks of these counters (RFC 8439, section 2.3)."""
    fixed = jnp.concatenate([jnp.array(CONSTANTS, jnp.uint32), key])
    ends = jnp.concatenate([counters[None], jnp.broadcast_to(nonce[:, None], (3, counters.size))])
    state = jnp.concatenate([jnp.broadcast_to(fixed[:, None], (12, counters.size)), ends]).reshape(4, 4, -1)

    def double_round(_, rows):
        a, b, c, d = _quarter_rounds(*rows)  # of the four columns
        b, c, d = (jnp.roll(row, -n, axis=0) for n, row in enumerate((b, c, d), 1))
        a, b, c, d = _quarter_rounds(a, b, c, d)  # of the four diagonals
        return (a, *(jnp.roll(row, n, axis=0) for n, row in enumerate((b, c, d), 1)))

    mixed = jnp.stack(jax.lax.fori_loop(0, 10, double_round, tuple(state)))
    return (mixed + state).reshape(16, -1).T


def normals(high: UInt32[Array, "..."], low: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Maps 64 random bits to a normal number, by the inverse of the normal distribution function.

    The first bit is the sign. The other bits, followed by a 1, are the tail probability times 2^65. The number of
    leading zeros and the four bits after the first 1 select the segment of the inverse; the next 24 bits are the
    position in the segment.
    """
    tail_high, tail_low = high << 1 | low >> 31, low << 1 | jnp.uint32(1)
    far = tail_high == 0  # more than 31 zeros
    first, second = jnp.where(far, tail_low, tail_high), jnp.where(far, 0, tail_low)
    zeros = jax.lax.clz(first)
    bits = (first << zeros) << 1 | (second >> 1) >> (jnp.uint32(30) - jnp.minimum(zeros, 30))
    bits = jnp.where(zeros == 31, second, bits)  # the first 1 was the last bit of `first`
    octave = zeros + jnp.where(far, jnp.uint32(32), jnp.uint32(0))
    c0, c1, c2, c3 = jnp.asarray(segments()).T
    chosen = (octave * 16 + (bits >> 28)).astype(jnp.int32)
    t = (bits >> 4 & jnp.uint32(0xFFFFFF)).astype(jnp.float32) * jnp.float32(2**-24)
    x = ((c3[chosen] * t + c2[chosen]) * t + c1[chosen]) * t + c0[chosen]
    return jnp.where(high >> 31 == 1, -x, x)


def _quarter_rounds(a, b, c, d):
    rotated = lambda x, n: x << n | x >> (32 - n)
    a = a + b
    d = rotated(d ^ a, 16)
    c = c + d
    b = rotated(b ^ c, 12)
    a = a + b
    d = rotated(d ^ a, 8)
    c = c + d
    return a, rotated(b ^ c, 7), c, d
