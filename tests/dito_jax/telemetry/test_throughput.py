"""Images per second and MFU match their formulas; no MFU for unknown hardware."""

from types import SimpleNamespace

import pytest

from dito_jax.telemetry.throughput import Throughput


def measure(device_kind: str, *, num_devices: int, dtype: str) -> list[dict]:
    """Two intervals, of 10 steps in 20 s and of 4 steps in 2 s, of 256 images and 10^15 flops a step."""
    clock = iter([100.0, 120.0, 122.0])
    throughput = Throughput(
        images_per_step=256,
        flops_per_step=1e15,
        dtype=dtype,
        devices=[SimpleNamespace(device_kind=device_kind)] * num_devices,
        clock=lambda: next(clock),
    )
    return [throughput.interval(10), throughput.interval(4)]


def test_interval_counts_from_the_one_before():
    first, second = measure("cpu", num_devices=1, dtype="float32")
    assert (first["images_per_second"], first["seconds_per_step"]) == (128.0, 2.0)
    assert (second["images_per_second"], second["seconds_per_step"]) == (512.0, 0.5)


def test_mfu_is_of_all_devices_at_the_dtypes_dense_peak():
    first, second = measure("NVIDIA H200", num_devices=8, dtype="bfloat16")
    assert first["mfu"] == pytest.approx(0.5e15 / (8 * 989.4e12))
    assert second["mfu"] == pytest.approx(2e15 / (8 * 989.4e12))
    assert measure("NVIDIA H200", num_devices=8, dtype="float32")[0]["mfu"] == pytest.approx(0.5e15 / (8 * 66.9e12))


def test_unknown_device_has_no_mfu():
    assert [figures["mfu"] for figures in measure("cpu", num_devices=1, dtype="float32")] == [None, None]
