"""The public function `secure_normal` (ChaCha20-based Gaussian noise) and the table of its implementations."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, UInt32

from .. import arguments
from ..op import Kernel, Op
from . import cost, ffi, reference
from .cases import SECURE_NORMAL as CASES


MOST = 2**31 - 1  # the largest value of `start`, which is int32
SECURE_NORMAL = Op(
    name="secure_normal",
    reference=reference.secure_normal,
    kernels={"ffi": Kernel(ffi.forward, reference.secure_normal_backward, ffi.unsupported, external=True)},
    cost={"forward": cost.secure_normal},
    cases=CASES,
)


def secure_normal(
    x: Float32[Array, "..."],
    key: UInt32[Array, " 8"],
    nonce: UInt32[Array, " 3"],
    *,
    stddev: float = 1.0,
    start: Int[Array, " dims"] | None = None,
    whole: tuple[int, ...] | None = None,
    implementation: str | None = None,
) -> Float32[Array, "..."]:
    """x + stddev n with Gaussian noise n from a cryptographically secure generator (ChaCha20).

    Each element of n uses 64 bits of ChaCha20's key stream (RFC 8439) and the inverse of the normal distribution
    function, within 1e-6, up to 9 standard deviations. Without the key, n is computationally indistinguishable from
    independent standard normal numbers. An element depends on the key, the nonce and its index in the whole array, not
    on the sharding. The results of `ffi` are bit-identical on all devices; those of `xla` agree up to XLA's rounding in
    the last bit. Numbers below 1.2e-38 may be flushed to zero, as XLA does on CPUs.

    Args:
      x: a shard of an array, with at least one dim.
      key: the secret key, 256 bits.
      nonce: 96 bits; a nonce may be used for only one array per key.
      stddev: a number known before jit, 0 or more.
      start: the index in the whole array at which the shard begins, one number per dim; None: 0. The shard must lie
        inside. If it does not, and `start` is not known, under jit, the result is NaN: other places' noise is never
        used twice.
      whole: the shape of the whole array; None: that of x. It may take at most 2^32 blocks of eight numbers, where each
        row starts a new block.
      implementation: a name in SECURE_NORMAL.kernels, or "xla"; if None, the fastest one known that runs here.

    Raises:
      ValueError: a shape, dtype or option is wrong, the shard is known not to lie inside, the whole array is too large,
        or `implementation` is unknown.
      NotImplementedError: `implementation` cannot run these arguments here.

    Source: Nir and Langley, RFC 8439, section 2.3, for the bits.
    """
    name = "secure_normal"
    x, key, nonce = arguments.arrays(name, x=x, key=key, nonce=nonce)
    stddev = arguments.number(name, "stddev", stddev, "multiply x and the result", low=0)
    whole = x.shape if whole is None else arguments.shape(name, "whole", whole)
    if wrong := _misfit(x, key, nonce, whole):
        raise ValueError(f"{name}: {wrong}.")
    if x.size == 0:
        return x
    start, inside = arguments.start(name, start, x.shape, whole)
    if inside is not None:
        x = jnp.where(inside, x, jnp.nan)
    return SECURE_NORMAL(x, key, nonce, start, stddev=stddev, whole=whole, implementation=implementation)


def _misfit(x, key, nonce, whole: tuple[int, ...]) -> str | None:
    if x.dtype != jnp.float32 or x.ndim == 0:
        return f"x must be float32 with at least one dim, got {x.dtype} {x.shape}; cast it to float32 to add noise"
    if (key.shape, nonce.shape) != ((8,), (3,)) or {key.dtype, nonce.dtype} != {jnp.dtype(jnp.uint32)}:
        return (
            "key and nonce must be 8 and 3 words of uint32, "
            f"got {key.dtype} {key.shape} and {nonce.dtype} {nonce.shape}"
        )
    if len(whole) != x.ndim or any(small > large for small, large in zip(x.shape, whole, strict=True)):
        return f"a shard of shape {x.shape} does not fit into an array of shape {whole}"
    if any(small < large > MOST for small, large in zip(x.shape, whole, strict=True)):
        return f"the array of shape {whole} is sharded along a dim larger than {MOST}; split that dim in two"
    blocks = -(-whole[-1] // reference.PER_BLOCK)
    for size in whole[:-1]:
        blocks *= size
    if blocks > 2**32:
        return f"the array of shape {whole} takes {blocks} blocks, a nonce has 2^32; split it, with a nonce per part"
    return None
