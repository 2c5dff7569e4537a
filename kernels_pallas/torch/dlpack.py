"""Arrays out of other libraries' tensors: the same memory, at what a call from PyTorch can afford.

`jnp.from_dlpack` takes 20 us a tensor, of which its part in C++ takes 2 (jax 0.11.2, a CPU core). That part is
jaxlib's own and may change, so it is called where it is known, and the public function everywhere else.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.version import __version__ as JAXLIB


KNOWN = JAXLIB.startswith("0.11.")  # the inner function's arguments are those given here
_to_array = importlib.import_module("jaxlib._jax").dlpack_managed_tensor_to_buffer if KNOWN else None
CPU, CUDA = 1, 2  # DLPack's numbers
NO_WAIT = -1  # as a stream: the memory is ready already


def from_dlpack(tensors: Sequence[Any]) -> list[jax.Array]:
    """`jnp.from_dlpack` of each: of one library, of one stream, and contiguous.

    On a GPU one wait for that stream is the wait for all, so give those of a call together. As there, integers of 64
    bits become those of 32.
    """
    arrays, streams = [], {}
    for tensor in tensors:
        kind, index = tensor.__dlpack_device__()
        if _to_array is None or kind not in (CPU, CUDA):
            arrays.append(jnp.from_dlpack(tensor))
            continue
        device = _device("cpu" if kind == CPU else "gpu", index)
        wait = NO_WAIT if device in streams else None
        if kind == CUDA and wait is None:  # of several, XLA names another at each question
            wait = streams[device] = device.get_stream_for_external_ready_events()
        array = _to_array(tensor.__dlpack__(stream=wait), device, streams.get(device), None, int(kind))
        arrays.append(jnp.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype)) if array.itemsize == 8 else array)
    return arrays


@functools.cache
def _device(platform: str, index: int) -> jax.Device:
    return next(d for d in jax.local_devices(backend=platform) if d.local_hardware_id == index)
