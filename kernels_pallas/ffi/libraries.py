"""The shared libraries of the custom calls in csrc/: their compile commands and their paths in the cache.

There are three libraries. "cpu" and "cuda" have the sources of csrc/ for each platform. "cutlass" has those of
csrc/cutlass/; it needs NVIDIA's CUTLASS headers, runs on Hopper only, and takes minutes to compile. The file name of a
library has a digest of its sources, its compiler options, the machine type, and the versions of jaxlib and of CUTLASS,
so that a library is rebuilt when one of them changes. The compiler is not part of the digest: a library may be copied
to a machine that has no compiler. The cache is $KERNELS_PALLAS_CACHE, or ~/.cache/kernels_pallas.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax


SOURCES = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = ("80", "90a", "100")  # Ampere, Hopper, Blackwell
LIBRARIES = ("cpu", "cuda", "cutlass")
FOLDERS = {"cpu": SOURCES, "cuda": SOURCES, "cutlass": SOURCES / "cutlass"}
COMMON = ("-std=c++17", "-O3", "-shared")


def compiler(library: str) -> str | None:
    """The path of the compiler: the first that exists of $CXX, c++ and g++, or nvcc; None if there is none."""
    names = (os.environ.get("CXX"), "c++", "g++") if library == "cpu" else ("nvcc",)
    return next((found for name in names if name and (found := shutil.which(name))), None)


def cutlass_headers() -> Path | None:
    """The folder of the CUTLASS headers: $CUTLASS_PATH/include, or that of the package nvidia-cutlass; or None."""
    if told := os.environ.get("CUTLASS_PATH"):
        folders = [Path(told, "include")]
    else:
        spec = importlib.util.find_spec("cutlass_library")  # found without importing it, which takes a second
        folders = [Path(f, "source", "include") for f in (spec and spec.submodule_search_locations) or ()]
    return next((folder for folder in folders if (folder / "cutlass" / "version.h").exists()), None)


def missing(library: str) -> str | None:
    """None if this machine can compile the library, else what to install."""
    if compiler(library) is None:
        return f"no compiler for {library} on PATH; install {'g++' if library == 'cpu' else 'nvcc'}."
    if library == "cutlass" and cutlass_headers() is None:
        return "no CUTLASS headers; pip install --no-deps nvidia-cutlass, or set CUTLASS_PATH to a checkout."
    return None


def built(library: str) -> Path:
    """The path of the library of the current sources, whether it is built or not."""
    digest = hashlib.sha256(f"{platform.machine()} {version('jaxlib')} {_options(library)}".encode())
    for path in _sources(library):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    if library == "cutlass" and (headers := cutlass_headers()):
        digest.update((headers / "cutlass" / "version.h").read_bytes())
    cache = os.environ.get("KERNELS_PALLAS_CACHE") or Path.home() / ".cache" / "kernels_pallas"
    return Path(cache) / f"custom_calls_{library}_{digest.hexdigest()[:16]}.so"


def build(library: str) -> Path:
    """The path of the library, which is compiled if it is not in the cache.

    Raises:
      RuntimeError: the compiler or the headers are missing, or the compiler failed (with its first error).
      OSError: the cache cannot be written.
    """
    path = built(library)
    if path.exists():
        return path
    if reason := missing(library):
        raise RuntimeError(reason)
    program = str(compiler(library))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # processes may build at once: the last one stays
        unfinished = Path(folder, path.name)
        done = subprocess.run([*_command(library, program), "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
            raise RuntimeError(f"{program} failed: {(errors or ['no error message'])[0]}")
        unfinished.replace(path)
    return path


def _command(library: str, program: str) -> list[str]:
    files = [str(source) for source in _sources(library) if source.suffix == (".cc" if library == "cpu" else ".cu")]
    headers = [jax.ffi.include_dir(), *([str(cutlass_headers())] if library == "cutlass" else [])]
    includes = [word for folder in headers for word in ("-isystem", folder)]
    return [program, *_options(library), *includes, *files]


def _options(library: str) -> tuple[str, ...]:
    if library == "cpu":
        return (*COMMON, "-fPIC", "-ffp-contract=off")  # no fused multiply-add: results are bit-identical everywhere
    target = lambda each: f"-gencode=arch=compute_{each},code=sm_{each}"
    if library == "cutlass":  # without NDEBUG CUTLASS kernels have assertions
        return (*COMMON, "-Xcompiler", "-fPIC", "-DNDEBUG", "--expt-relaxed-constexpr", target("90a"))
    return (*COMMON, "-Xcompiler", "-fPIC", "--fmad=false", "-diag-suppress=20012", *map(target, ARCHITECTURES))


def _sources(library: str) -> list[Path]:
    return sorted(path for path in FOLDERS[library].iterdir() if path.suffix in (".h", ".cc", ".cu"))
