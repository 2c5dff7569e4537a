"""The public function of this family, and its table."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped, UInt32

from ..op import Kernel, Op
from . import cost, ffi, reference
from .cases import STATE_DIGEST as CASES


MOST = 2**31 - 1  # what a start can say
STATE_DIGEST = Op(
    name="state_digest",
    reference=reference.state_digest,
    kernels={"ffi": Kernel(ffi.forward, ffi.backward, ffi.unsupported, external=True)},
    cost={"forward": cost.state_digest},
    cases=CASES,
)


def state_digest(
    x: Shaped[Array, "..."],
    *,
    start: Int[Array, " dims"] | None = None,
    whole: tuple[int, ...] | None = None,
    implementation: str | None = None,
) -> UInt32[Array, " 4"]:
    """128 bits that change when any bit of x does, or two numbers change places; the same on every device.

    A sum over elements, modulo 2^32 in each of four words: digests of pieces, each with its start in the whole, add up
    to the whole's, in any order and however it was cut. One changed number is always seen; more at once are missed with
    a chance of some 2^-128. It is no cryptographic hash: who wants to, can make another array of the same digest.

    Args:
      x: the piece of an array that is at hand; numbers of 1, 2, 4 or 8 bytes.
      start: where in the whole array the piece begins, in each dim, for it to lie inside; None: at its beginning.
      whole: the whole array's shape; None: that of x.
      implementation: one of STATE_DIGEST's; the best that runs here where None.

    Raises:
      ValueError: x is complex, of random keys or of numbers that share a byte, or no piece of the whole, or
        `implementation` is unknown.
      NotImplementedError: `implementation` cannot run here.
    """
    if wrong := _misfit(x, whole):
        raise ValueError(f"state_digest: {wrong}.")
    x, start = (x[None], None) if x.ndim == 0 else (x, start)
    whole = whole or x.shape
    start = jnp.zeros(x.ndim, jnp.int32) if start is None else start.astype(jnp.int32)
    return STATE_DIGEST(jax.lax.stop_gradient(x), start, whole=whole, implementation=implementation)


def _misfit(x, whole: tuple[int, ...] | None) -> str | None:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return f"got {x.dtype}; give jax.random.key_data of it"
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return f"got {x.dtype}; give its real and imaginary parts, one after the other"
    if jax.dtypes.itemsize_bits(x.dtype) < 8:
        return f"got {x.dtype}, whose numbers share a byte; cast it to int8 or uint8"
    whole = whole or x.shape
    if len(whole) != x.ndim or any(small > large for small, large in zip(x.shape, whole, strict=True)):
        return f"x {x.shape} is no piece of a whole of shape {whole}"
    if any(small < large > MOST for small, large in zip(x.shape, whole, strict=True)):
        return f"the whole of shape {whole} is cut where a dim has more than {MOST} places; split that dim in two"
    return None
