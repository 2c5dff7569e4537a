"""The public function of this family, and its table."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, UInt32

from ..op import Kernel, Op
from . import cost, ffi, reference
from .cases import SECURE_NORMAL as CASES


MOST = 2**31 - 1  # what a start can say
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
    """x + stddev n, n of independent standard normal numbers that nobody without the key can tell from chance.

    They are made of ChaCha20's key stream (RFC 8439), 64 bits each, by the normal's inverse: up to 9 standard
    deviations, within 1e-6. Which number an element gets depends on key, nonce and its place in the whole array, not on
    how that is cut: `ffi` has the same on every device to the bit, `xla` to the last one, as XLA rounds. Below 1.2e-38
    a number may be zero, as it is to XLA on CPUs.

    Args:
      x: the piece of an array that is at hand; of one dim at least.
      key: 256 bits, as numbers that are kept secret.
      nonce: 96 bits; with one key each may be used for one array alone.
      start: where in the whole array the piece begins, in each dim, for it to lie inside; None: at its beginning.
      whole: the whole array's shape; None: that of x. Up to 2^32 blocks of eight numbers, each row beginning one.
      implementation: one of SECURE_NORMAL's; the best that runs here where None.

    Raises:
      ValueError: shapes or dtypes are not these, the whole is larger, or `implementation` is unknown.
      NotImplementedError: `implementation` cannot run here.

    Source: Nir and Langley, RFC 8439, section 2.3, for the bits.
    """
    whole = whole or x.shape
    if wrong := _misfit(x, key, nonce, whole):
        raise ValueError(f"secure_normal: {wrong}.")
    start = jnp.zeros(x.ndim, jnp.int32) if start is None else start.astype(jnp.int32)
    return SECURE_NORMAL(x, key, nonce, start, stddev=stddev, whole=whole, implementation=implementation)


def _misfit(x, key, nonce, whole: tuple[int, ...]) -> str | None:
    if x.dtype != jnp.float32 or x.ndim == 0:
        return f"x must be float32 with one dim at least, got {x.dtype} {x.shape}; noise in less would be rounded away"
    if (key.shape, nonce.shape) != ((8,), (3,)) or {key.dtype, nonce.dtype} != {jnp.dtype(jnp.uint32)}:
        return (
            "key and nonce must be 8 and 3 words of uint32, "
            f"got {key.dtype} {key.shape} and {nonce.dtype} {nonce.shape}"
        )
    if len(whole) != x.ndim or any(small > large for small, large in zip(x.shape, whole, strict=True)):
        return f"x {x.shape} is no piece of a whole of shape {whole}"
    if any(small < large > MOST for small, large in zip(x.shape, whole, strict=True)):
        return f"the whole of shape {whole} is cut where a dim has more than {MOST} places; split that dim in two"
    blocks = -(-whole[-1] // reference.PER_BLOCK)
    for size in whole[:-1]:
        blocks *= size
    if blocks > 2**32:
        return f"the whole of shape {whole} takes {blocks} blocks, a nonce has 2^32; give its parts nonces of their own"
    return None
