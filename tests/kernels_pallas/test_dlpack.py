"""Arrays out of tensors are what jnp.from_dlpack makes, in the same memory; NumPy's arrays are the tensors here."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.torch import dlpack


CPU_ONLY = pytest.mark.skipif(jax.default_backend() != "cpu", reason="NumPy's arrays are on a CPU")
KNOWN = pytest.mark.skipif(not dlpack.KNOWN, reason="another jaxlib than is known here")
DTYPES = [np.float32, np.float16, np.int8, np.int32, np.uint32, np.int64, np.complex64]


def aligned(shape, dtype):
    """0, 1, ... in memory that begins on 64 bytes, as JAX wants it."""
    size = int(np.prod(shape))
    memory = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    tensor = memory[start : start + size * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
    tensor[...] = np.arange(size).reshape(shape)
    return tensor


class Tensor:
    """NumPy's memory under another device's name, and what was asked of it."""

    def __init__(self, array, device=None):
        self.array, self.device, self.streams = array, device or array.__dlpack_device__(), []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        return self.array.__dlpack__()


@CPU_ONLY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 6), (1,), (), (0, 3)])
def test_it_is_the_public_function(dtype, shape):
    tensor = aligned(shape, dtype)
    (array,), wanted = dlpack.from_dlpack([tensor]), jnp.from_dlpack(tensor)
    assert array.dtype == wanted.dtype and array.shape == shape and array.sharding == wanted.sharding
    assert array.aval == wanted.aval and array.committed == wanted.committed
    np.testing.assert_array_equal(array, wanted)


@CPU_ONLY
@pytest.mark.parametrize("inner", [dlpack._to_array, None])
def test_the_memory_is_shared(inner, monkeypatch):
    monkeypatch.setattr(dlpack, "_to_array", inner)
    tensors = [aligned((8, 2), np.float32), aligned((3,), np.int32)]
    arrays = dlpack.from_dlpack(tensors)
    assert [a.unsafe_buffer_pointer() for a in arrays] == [t.ctypes.data for t in tensors]


@CPU_ONLY
@KNOWN
def test_jaxlib_is_known_here_and_the_public_function_is_not_called(monkeypatch):
    monkeypatch.setattr(dlpack.jnp, "from_dlpack", None)
    (array,) = dlpack.from_dlpack([aligned((4,), np.float32)])
    assert array.tolist() == [0, 1, 2, 3]


@CPU_ONLY
def test_an_unknown_device_is_the_public_functions(monkeypatch):
    pinned, given = Tensor(aligned((4,), np.float32), (3, 0)), []
    monkeypatch.setattr(dlpack.jnp, "from_dlpack", lambda tensor: given.append(tensor) or jnp.zeros(4))
    dlpack.from_dlpack([pinned])
    assert given == [pinned] and pinned.streams == []


class Gpu:
    """A device with streams, of which it names one after another."""

    def __init__(self, first):
        self.streams = itertools.count(first)

    def get_stream_for_external_ready_events(self):
        return next(self.streams)


@KNOWN
def test_a_stream_that_has_waited_is_every_tensors_once_each_gpu(monkeypatch):
    gpus, handed = {0: Gpu(70), 1: Gpu(80)}, []
    monkeypatch.setattr(dlpack, "_device", lambda platform, index: gpus[index])
    convert = dlpack._to_array

    def on_cpu(capsule, device, stream, copy, kind):
        handed.append((device, stream, kind))
        return convert(capsule, jax.devices("cpu")[0], None, copy, 1)

    monkeypatch.setattr(dlpack, "_to_array", on_cpu)
    tensors = [Tensor(aligned((4,), np.float32), (2, index)) for index in (0, 0, 1, 0)]
    dlpack.from_dlpack(tensors)
    assert [t.streams for t in tensors] == [[70], [-1], [80], [-1]]
    assert handed == [(gpus[0], 70, 2), (gpus[0], 70, 2), (gpus[1], 80, 2), (gpus[0], 70, 2)]
