"""Throughput of training: images per second and model FLOPs utilization (MFU)."""

import time
from collections.abc import Callable

import jax

from kernels_pallas import hardware


class Throughput:
    """Measures the throughput of each log interval.

    images/s = images_per_step * steps / seconds
    MFU      = flops_per_step * steps / seconds / (peak flop/s of one device * devices)

    `images_per_step` and `flops_per_step` are for the global batch; `dtype` is that of the matrix products. The peak is
    the dense peak in kernels_pallas/hardware.py; for a device without one the MFU is None. Seconds are wall time,
    including everything between two steps (a checkpoint, an evaluation).
    """

    def __init__(
        self,
        *,
        images_per_step: int,
        flops_per_step: float,
        dtype: str,
        devices: list[jax.Device] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        devices = jax.devices() if devices is None else devices
        gpu = hardware.by_device_kind(devices[0].device_kind)
        self._peak = None if gpu is None else gpu.peak(dtype) * len(devices)
        self._images, self._flops, self._clock = images_per_step, flops_per_step, clock
        self._since = clock()

    def interval(self, steps: int) -> dict[str, float | None]:
        """Throughput of the `steps` since the last call, or since the start.

        Call it after waiting for the results of the steps: JAX returns from a step before the device has run it.
        """
        now = self._clock()
        seconds, self._since = now - self._since, now
        mfu = None if self._peak is None else self._flops * steps / seconds / self._peak
        return {
            "images_per_second": self._images * steps / seconds,
            "seconds_per_step": seconds / steps,
            "mfu": mfu,
        }
