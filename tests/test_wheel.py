"""The wheel, installed in an environment of its own, in an empty directory: what ships in it is all that it needs."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SMALL = [
    "--model.depth", "1", "--model.width", "32", "--train.batch_size", "32", "--train.steps", "20",
    "--sample.steps", "2", "--evaluation.num_samples", "20", "--evaluation.grid", "10",
]  # fmt: skip
STALE = ["-m", "kernels_pallas.bench", "--stale"]
SHIPPED = [
    "dito_jax/py.typed", "kernels_pallas/py.typed", "kernels_pallas/csrc/both.h",
    "kernels_pallas/csrc/secure_normal.cc", "kernels_pallas/csrc/cutlass/grouped_gemm.cu",
    "kernels_pallas/randomness/segments.npy",
    "kernels_pallas/results/nvidia_h100_80gb_hbm3.csv", "dito_jax/_bundled/train.py",
    "dito_jax/_bundled/configs/digits.py",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,  # builds a wheel, and trains in four processes
    pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="needs hatchling, of the dev extra"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, ROOT]
    subprocess.run(command, check=True, timeout=300)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def call(wheel, tmp_path_factory):
    """`call(*words)`: a command of a fresh environment that has the wheel, and the dependencies of this one."""
    root = tmp_path_factory.mktemp("installed")
    venv.create(root / "venv", with_pip=False)
    python = root / "venv" / "bin" / "python"
    paths = {"base": str(root / "venv"), "platbase": str(root / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(install, check=True, timeout=300)
    # Behind the environment's own packages on sys.path. Its .pth files are not read: no editable install comes with it.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (root / "empty").mkdir()
    unset = ("PYTHONPATH", "JAX_PLATFORMS", "XLA_FLAGS", "NPROC")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"DITO_CACHE": str(root / "cache"), "PATH": f"{root / 'venv' / 'bin'}:{environment['PATH']}"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=root / "empty", env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    assert str(root) in run(
        "python", "-c", "import dito_jax, kernels_pallas as k; print(dito_jax.__file__, k.__file__)"
    )
    return run


def test_the_wheel_holds_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
    assert set(SHIPPED) <= names
    configs = {f"dito_jax/_bundled/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert configs == {name for name in names if "/configs/" in name}
    assert not [name for name in names if name.startswith(("tests", "docs", "train.py")) or "__pycache__" in name]


@pytest.mark.slow("trains, samples and supervises in new processes")
def test_it_trains_samples_and_supervises_in_an_empty_directory(call):
    call("dito", "train", "digits", *SMALL, "--run-dir", "r")
    assert call("dito", "sample", "r", "--num", "2").startswith("r/samples/step_20_seed_0.png")
    call("dito", "supervise", "digits", *SMALL, "--run-dir", "x")
    assert call("dito", "digest", "r").split()[-1] == call("dito", "digest", "x").split()[-1]


def test_its_other_commands_find_their_files(call):
    assert "digits" in call("dito", "configs", "list")
    assert call("dito", "--version").startswith("dito_jax ")
    assert "flash_attention xla: runs" in call("dito", "doctor")
    here = subprocess.run([sys.executable, *STALE], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert call("python", *STALE) == here.stdout  # the measurements, and the digests of the source
