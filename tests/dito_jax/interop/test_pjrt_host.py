"""examples/pjrt_host: calls to the plug-in, comparison of the results, and messages about missing files."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.backend import gpu_present
from kernels_pallas.ffi import libraries
from kernels_pallas.hardware import GPUS


pytestmark = pytest.mark.optimized("an artifact's results are compared, to the bit, with those of another process")


ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
GPU = gpu_present()
TYPES = {"bool": 1, "int8": 2, "int32": 4, "uint8": 6, "uint32": 8, "float32": 11, "bfloat16": 13}  # PJRT_Buffer_Type


def include() -> Path | None:
    """The folder of xla/pjrt/c/pjrt_c_api.h: $PJRT_INCLUDE, or that of an installed TensorFlow."""
    spec = importlib.util.find_spec("tensorflow")
    folders = [Path(folder, "include") for folder in (spec.submodule_search_locations or [] if spec else [])]
    if named := os.environ.get("PJRT_INCLUDE"):
        folders.insert(0, Path(named))
    return next((folder for folder in folders if (folder / "xla/pjrt/c/pjrt_c_api.h").exists()), None)


def plugin() -> Path | None:
    """JAX's plug-in for CUDA, where it is installed."""
    spec = importlib.util.find_spec("jax_plugins")
    folders = spec.submodule_search_locations or [] if spec else []
    found = [Path(folder, "xla_cuda13/xla_cuda_plugin.so") for folder in folders]
    return next((path for path in found if path.exists()), None)


def compiled(source: Path, out: Path, *options: str) -> Path:
    if (compiler := libraries.compiler("cpu")) is None:
        pytest.skip("needs a C++ compiler")
    if (folder := include()) is None:
        pytest.skip("needs xla/pjrt/c/pjrt_c_api.h: PJRT_INCLUDE=FOLDER, or TensorFlow installed")
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", folder, source, "-o", out, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Path:
    return compiled(ROOT / "examples/pjrt_host/main.cc", tmp_path_factory.mktemp("host") / "pjrt_host", "-ldl")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stand_in") / "stand_in.so"
    return compiled(HERE / "stand_in_plugin.cc", out, "-shared", "-fPIC")


@pytest.fixture
def run(host):
    """`run(*words, code=2, STAND_IN=...)`: what the host says and ends with; one line where it could not run."""

    def ended(*words: object, code: int, **environment: object) -> str:
        settings = os.environ | {name: str(value) for name, value in environment.items()}
        settings.pop("TF_CPP_MIN_LOG_LEVEL", None)  # JAX sets it for its own process
        done = subprocess.run([host, *map(str, words)], capture_output=True, text=True, env=settings, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        if code == 2:
            assert done.stderr.startswith("pjrt_host: ") and done.stderr.count("\n") == 1 and not done.stdout
        return done.stdout + done.stderr

    return ended


@pytest.fixture
def results(artifact_of, listed, tmp_path):
    """`results(what)`: the stand-in's folder, whose results are those recorded."""

    def written(what: str) -> Path:
        for i, array in enumerate(listed(artifact_of(what), "output")):
            (tmp_path / f"output{i}").write_bytes(array.tobytes())
        return tmp_path

    return written


@pytest.mark.parametrize("what", ["denoiser", "sampler", "train_step"])
def test_the_plug_in_gets_program_options_and_every_argument_to_the_bit(
    run, stand_in, artifact_of, listed, results, what
):
    directory, got = artifact_of(what), results(what)
    said = run(stand_in, directory, code=0, STAND_IN=got)
    inputs, outputs = listed(directory, "input"), listed(directory, "output")
    assert said.endswith(f"arguments {len(inputs)}, outputs {len(outputs)}, wrong 0\n")
    assert (got / "program").read_bytes() == (directory / "host/cuda.mlirbc").read_bytes()
    assert (got / "options").read_bytes() == (directory / "host/options.pb").read_bytes()
    lines = [" ".join(map(str, (TYPES[array.dtype.name], *array.shape))) for array in inputs]
    assert (got / "arguments.txt").read_text().splitlines() == lines
    for i, array in enumerate(inputs):
        assert (got / f"argument{i}").read_bytes() == array.tobytes()
    assert (got / "left").read_text() == "0"  # all that the plug-in made was destroyed
    assert run(stand_in, directory, "cpu", code=0, STAND_IN=got)
    assert (got / "program").read_bytes() == (directory / "host/cpu.mlirbc").read_bytes()


def test_wrong_results_are_one_and_say_how_wrong(run, stand_in, artifact_of, listed, results):
    directory, got = artifact_of("denoiser"), results("denoiser")
    (wanted,) = listed(directory, "output")
    largest = np.abs(wanted).max()
    for amount, tolerance, code in ((0.009, "", 0), (0.011, "", 1), (0.011, "0.02", 0), (np.nan, "", 1)):
        changed = wanted.copy()
        changed[-1, -1, -1, -1] += amount * largest
        (got / "output0").write_bytes(changed.tobytes())
        said = run(stand_in, directory, "cuda", *tolerance.split(), code=code, STAND_IN=got)
        wrong = "inf" if np.isnan(amount) else f"{amount * largest:.3g}"
        assert f"output 0: max abs difference {wrong}, tolerance {float(tolerance or 0.01) * largest:.3g}" in said


def test_integers_must_be_the_same(run, stand_in, artifact_of, listed, results):
    directory, got = artifact_of("train_step"), results("train_step")
    outputs = listed(directory, "output")
    index = next(i for i, array in enumerate(outputs) if array.dtype == jnp.int32 and array.max() > 0)
    (got / f"output{index}").write_bytes((outputs[index] + 1).tobytes())
    said = run(stand_in, directory, code=1, STAND_IN=got)
    assert f"output {index}: max abs difference 1, tolerance 0: WRONG" in said and said.endswith("wrong 1\n")


def test_what_is_missing_is_said_in_a_line(run, stand_in, artifact_of, results, tmp_path):
    directory = artifact_of("denoiser")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "usage: pjrt_host" in run(code=2)
    assert "no plug-in: /nowhere.so" in run("/nowhere.so", directory, code=2)
    assert "no device: no output0" in run(stand_in, directory, code=2, STAND_IN=empty)
    got = results("denoiser")
    assert "`dito export RUN" in run(stand_in, empty, code=2, STAND_IN=got)
    assert "host/rocm.mlirbc: not there" in run(stand_in, directory, "rocm", code=2, STAND_IN=got)
    assert "no tolerance" in run(stand_in, directory, "cuda", "much", code=2, STAND_IN=got)
    assert "build it with that header" in run(stand_in, directory, code=2, STAND_IN=got, STAND_IN_NEW=1)
    old = run(stand_in, directory, code=2, STAND_IN=got, STAND_IN_OLD=1)
    assert "too old: it has no PJRT_LoadedExecutable_Execute" in old
    (got / "output1").write_bytes(b"")
    assert "has 2 outputs, wanted 1" in run(stand_in, directory, code=2, STAND_IN=got)


def test_an_artifact_that_is_cut_short_is_refused(run, stand_in, artifact_of, results, tmp_path):
    got, cut = results("denoiser"), tmp_path / "cut"
    shutil.copytree(artifact_of("denoiser"), cut)
    path = cut / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "weights.safetensors: shorter than" in run(stand_in, cut, code=2, STAND_IN=got)
    listing = (cut / "host/arguments.txt").read_text().splitlines()
    for at, past in ((2, 2**62), (3, 2**62), (2, 2**64 - 4)):  # an offset, and a size with its dimension
        fields = ["input", "weights.safetensors", "0", "4", "float32", "1"]
        fields[at] = str(past)
        fields[5] = str(int(fields[3]) // 4)
        (cut / "host/arguments.txt").write_text("\n".join([" ".join(fields), *listing]))
        assert "weights.safetensors: shorter than" in run(stand_in, cut, code=2, STAND_IN=got)
    (cut / "host/arguments.txt").write_text("input weights.safetensors 0 8 float32 3\n")
    assert "not understood: input weights.safetensors 0 8 float32 3" in run(stand_in, cut, code=2, STAND_IN=got)


@pytest.mark.deviceless
def test_the_plug_in_of_cuda_compiles_it_for_a_gpu_that_is_not_there(run, artifact_of, tmp_path):
    if (library := plugin()) is None:
        pytest.skip("needs JAX's plug-in for CUDA")
    directory, target = artifact_of("denoiser"), tmp_path / "h200.txt"
    target.write_text(GPUS["h200"].target_config())
    assert "compiled, arguments 24, outputs 1" in run("--compile", target, library, directory, code=0)
    target.write_text("no GPU")
    assert "PJRT_TopologyDescription_Create: " in run("--compile", target, library, directory, code=2)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_the_plug_in_of_cuda_is_a_line(run, artifact_of):
    if (library := plugin()) is None:
        pytest.skip("needs JAX's plug-in for CUDA")
    assert "PJRT_Client_Create: " in run(library, artifact_of("denoiser"), code=2)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("what", ["denoiser", "sampler"])
def test_on_a_gpu_the_results_are_those_recorded(run, artifact_of, what):
    if (library := plugin()) is None:
        pytest.skip("needs JAX's plug-in for CUDA")
    assert run(library, artifact_of(what), code=0).endswith("wrong 0\n")


def test_cmake_says_what_it_needs(tmp_path):
    if shutil.which("cmake") is None or libraries.compiler("cpu") is None:
        pytest.skip("needs cmake and a C++ compiler")
    source = ROOT / "examples/pjrt_host"
    asked = subprocess.run(
        ["cmake", "-S", source, "-B", tmp_path, "-DPJRT_INCLUDE=/nowhere"], capture_output=True, text=True
    )
    assert asked.returncode and "give its folder as -DPJRT_INCLUDE=FOLDER" in asked.stderr
