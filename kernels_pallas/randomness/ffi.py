"""Secure noise as an FFI custom call for CPUs and NVIDIA GPUs, bit-identical: csrc/secure_normal.cc and .cu."""

import jax
import jax.numpy as jnp
import numpy as np

from ..ffi import custom_calls
from .segments import segments


def unsupported(x, key, nonce, start, *, stddev, whole) -> str | None:
    """The reason why these arguments cannot run here, or None."""
    del key, nonce, start, stddev, whole
    if x.ndim > 8:
        return f"needs at most 8 dims, got {x.ndim}"
    return custom_calls.why_not()


def forward(x, key, nonce, start, *, stddev, whole):
    """The result, in place of x if XLA needs x no longer; there are no residuals."""
    out = custom_calls.call(
        "secure_normal", jax.ShapeDtypeStruct(x.shape, x.dtype), x, key, nonce, start, jnp.asarray(segments()),
        aliases={0: 0}, stddev=np.float32(stddev), whole=np.array(whole, np.int64),
    )  # fmt: skip
    return out, None
