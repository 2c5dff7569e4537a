"""Libraries of custom calls: when one is built, what one that cannot be used says, and that a command never crashes."""

import concurrent.futures
import importlib.util
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import state_digest
from kernels_pallas.ffi import build as build_command, custom_calls, libraries


@pytest.mark.parametrize("content", [b"\x7fELF cut short", b"no library at all"])
def test_what_cannot_be_loaded_is_not_used_and_says_how_to_cure_it(tmp_path, monkeypatch, content):
    monkeypatch.setenv("KERNELS_PALLAS_CACHE", str(tmp_path))
    monkeypatch.setattr(custom_calls, "_registered", set())
    libraries.built("cpu").write_bytes(content)
    by_default, by_xla = state_digest(jnp.ones(3)), state_digest(jnp.ones(3), implementation="xla")
    np.testing.assert_array_equal(by_default, by_xla)
    with pytest.raises(
        NotImplementedError, match=f"cannot be loaded .* remove {libraries.built('cpu')} and run python"
    ):
        state_digest(jnp.ones(3), implementation="ffi")


def test_a_library_of_another_program_is_not_used(tmp_path, monkeypatch):
    if (compiler := libraries.compiler("cpu")) is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setenv("KERNELS_PALLAS_CACHE", str(tmp_path))
    monkeypatch.setattr(custom_calls, "_registered", set())
    subprocess.run([compiler, "-shared", "-o", libraries.built("cpu"), "-x", "c++", "/dev/null"], check=True)
    assert "cannot be loaded" in (custom_calls.why_not() or "") and not custom_calls._registered


def test_threads_that_build_at_once_all_have_the_library(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_PALLAS_CACHE", str(tmp_path / "cache"))
    started = threading.Barrier(3)

    def compile_slowly(command, **_):
        started.wait(10)
        Path(command[-1]).write_text("a library")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(libraries, "compiler", lambda library: "c++")
    monkeypatch.setattr(subprocess, "run", compile_slowly)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(libraries.build, ["cpu"] * 3))
    assert {path.read_text() for path in found} == {"a library"}
    assert list((tmp_path / "cache").iterdir()) == [libraries.built("cpu")]


def test_a_cache_that_is_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KERNELS_PALLAS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(custom_calls, "_registered", set())
    monkeypatch.setattr(libraries, "compiler", lambda library: "c++")
    monkeypatch.setattr(sys, "argv", ["build", "cpu"])
    assert build_command.main() == 1
    assert capsys.readouterr().err.startswith("build: ")
    assert custom_calls.why_not() is not None


def test_what_is_built_is_what_can_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KERNELS_PALLAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/compilers/{name}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    without = libraries.built("cutlass")
    monkeypatch.setattr(sys, "argv", ["build", "cutlass"])
    assert build_command.main() == 1
    assert "no CUTLASS headers; pip install --no-deps nvidia-cutlass" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(build_command, "build", asked.append)
    monkeypatch.setattr(sys, "argv", ["build"])
    assert build_command.main() == 0 and asked == ["cpu", "cuda"]
    versions = []
    for version in ("4.1", "4.2"):
        headers = tmp_path / version / "include" / "cutlass"
        headers.mkdir(parents=True)
        (headers / "version.h").write_text(version)
        monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / version))
        assert libraries.cutlass_headers() == headers.parent and libraries.missing("cutlass") is None
        versions.append(libraries.built("cutlass"))
    assert len({without, *versions}) == 3
    asked.clear()
    assert build_command.main() == 0 and asked == ["cpu", "cuda", "cutlass"]


def test_an_unknown_library_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build", "rocm"])
    assert build_command.main() == 2
    assert capsys.readouterr().err == "build: no library 'rocm'; choose from cpu, cuda, cutlass.\n"
