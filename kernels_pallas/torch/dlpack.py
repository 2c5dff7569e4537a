"""Fast zero-copy conversion of tensors of other libraries to JAX arrays via DLPack.

`jnp.from_dlpack` takes 20 us per tensor, of which its C++ part takes 2 us (jax 0.11.2, on a CPU core). The C++ function
is private to jaxlib and may change, so it is called only in versions of jaxlib where its arguments are known; in others
the public function is called.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.version import __version__ as JAXLIB


KNOWN = JAXLIB.startswith("0.11.")  # the versions in which the private function takes the arguments used here
_to_array = importlib.import_module("jaxlib._jax").dlpack_managed_tensor_to_buffer if KNOWN else None
CPU, CUDA = 1, 2  # DLPack's device types
NO_WAIT = -1  # DLPack's stream argument for memory that is ready


def from_dlpack(tensors: Sequence[Any]) -> list[jax.Array]:
    """`jnp.from_dlpack` of each tensor. The tensors must be contiguous, of one library and on one stream.

    On a GPU there is one synchronisation with that stream for all tensors, so convert the tensors of one call together.
    64-bit integers become 32-bit integers, as in `jnp.from_dlpack`.
    """
    arrays, streams = [], {}
    for tensor in tensors:
        kind, index = tensor.__dlpack_device__()
        if _to_array is None or kind not in (CPU, CUDA):
            arrays.append(jnp.from_dlpack(tensor))
            continue
        device = _device("cpu" if kind == CPU else "gpu", index)
        wait = NO_WAIT if device in streams else None
        if kind == CUDA and wait is None:  # ask once: XLA has several streams and returns another one at each call
            wait = streams[device] = device.get_stream_for_external_ready_events()
        array = _to_array(tensor.__dlpack__(stream=wait), device, streams.get(device), None, int(kind))
        arrays.append(jnp.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype)) if array.itemsize == 8 else array)
    return arrays


@functools.cache
def _device(platform: str, index: int) -> jax.Device:
    return next(d for d in jax.local_devices(backend=platform) if d.local_hardware_id == index)
