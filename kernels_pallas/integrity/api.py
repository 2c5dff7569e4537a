"""The public function `state_digest`, a sharding-independent checksum, and the table of its implementations."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped, UInt32

from .. import arguments
from ..op import Kernel, Op
from . import cost, ffi, reference
from .cases import STATE_DIGEST as CASES


MOST = 2**31 - 1  # the largest value of `start`, which is int32
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
    """A 128-bit checksum of an array that depends on every bit and on the order of elements; the same on every device.

    It is a sum over elements, modulo 2^32 in each of four words. So the checksums of the shards of an array, each with
    its `start` in the whole array, add up to the checksum of the whole array, in any order and for any sharding. A
    change of one element is always detected; several changes are missed with probability of about 2^-128. It is not a
    cryptographic hash: it does not protect against deliberate changes.

    Args:
      x: a shard of an array; elements of 1, 2, 4 or 8 bytes.
      start: the index in the whole array at which the shard begins, one number per dim; None: 0. The shard must lie
        inside. If it does not, and `start` is not known, under jit, all four words are 2^32 - 1.
      whole: the shape of the whole array; None: that of x.
      implementation: a name in STATE_DIGEST.kernels, or "xla"; if None, the fastest one known that runs here.

    Raises:
      ValueError: x is complex, of PRNG keys or of elements of fewer than 8 bits; x does not fit into the whole array
        or is known not to lie inside; or `implementation` is unknown.
      NotImplementedError: `implementation` cannot run these arguments here.
    """
    name = "state_digest"
    [x] = arguments.arrays(name, x=x)
    x = jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x
    whole = None if whole is None else arguments.shape(name, "whole", whole)
    if wrong := _misfit(x, whole):
        raise ValueError(f"state_digest: {wrong}.")
    x, start = (x[None], None) if x.ndim == 0 else (x, start)
    whole = whole or x.shape
    start, inside = arguments.start(name, start, x.shape, whole)
    found = STATE_DIGEST(jax.lax.stop_gradient(x), start, whole=whole, implementation=implementation)
    return found if inside is None else jnp.where(inside, found, jnp.uint32(2**32 - 1))


def _misfit(x, whole: tuple[int, ...] | None) -> str | None:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return f"got {x.dtype}; give jax.random.key_data of it"
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return f"got {x.dtype}; give its real and imaginary parts separately"
    if jax.dtypes.itemsize_bits(x.dtype) < 8:
        return f"got {x.dtype}, whose elements are smaller than a byte; cast it to int8 or uint8"
    whole = whole or x.shape
    if len(whole) != x.ndim or any(small > large for small, large in zip(x.shape, whole, strict=True)):
        return f"a shard of shape {x.shape} does not fit into an array of shape {whole}"
    if any(small < large > MOST for small, large in zip(x.shape, whole, strict=True)):
        return f"the array of shape {whole} is sharded along a dim larger than {MOST}; split that dim in two"
    return None
