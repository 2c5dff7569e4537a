"""Which device is chosen, and what is said of it."""

import importlib.util

import jax
import pytest

from kernels_pallas import backend, deviceless, hardware


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(backend, "gpu_present", lambda: False)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")


def test_without_cuda_wheels_nothing_is_said(no_gpu, monkeypatch, capsys):
    """As on a fresh machine with a CPU alone, where no plug-in of any kind is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not backend.cuda_wheels_installed()
    backend.settle_platform()
    assert capsys.readouterr() == ("", "")
    assert "deviceless" in (deviceless.why_not() or "")


def test_cuda_wheels_without_a_gpu_are_one_line(no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(backend, "cuda_wheels_installed", lambda: True)
    backend.settle_platform()
    assert jax.config.jax_platforms == "cpu"
    assert capsys.readouterr().err.splitlines() == [
        "No NVIDIA GPU found: running on the CPU; the CUDA wheels are only used to compile."
    ]


def test_the_target_is_the_device_of_the_mesh_in_force():
    assert backend.target().platform == "cpu"
    kind = hardware.A100.device_kind
    device = jax.sharding.AbstractDevice(device_kind=kind, platform="gpu", num_cores=108)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert backend.target() == backend.Target("gpu", kind, 8.0)
        assert backend.why_not_triton() is None
    assert "needs an NVIDIA GPU" in (backend.why_not_triton() or "")


def test_an_old_gpu_is_refused_with_its_capability(monkeypatch):
    monkeypatch.setattr(backend, "target", lambda: backend.Target("gpu", "Tesla V100", 7.0))
    assert backend.why_not_triton() == "needs compute capability 8.0 or higher, got 7.0 (Tesla V100)"


@pytest.mark.parametrize("name", hardware.GPUS)
def test_every_gpu_can_be_named_to_the_compiler(name):
    gpu = hardware.GPUS[name]
    assert hardware.by_device_kind(gpu.device_kind) is gpu
    assert f"major: {int(gpu.capability)} " in gpu.target_config()
    assert gpu.peak("bfloat16") > gpu.peak("float32") > 0 and gpu.source
