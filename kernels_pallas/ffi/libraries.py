"""Where the custom calls of csrc/ lie once they are compiled, and how they are.

There are three libraries: "cpu" and "cuda" of what csrc/ has for each, and "cutlass" of csrc/cutlass/, which needs
NVIDIA's headers, is for Hopper alone, and takes minutes. A library is named by a digest of the sources, of the command,
of the kind of processor and of the versions of jaxlib and of CUTLASS: where one of them changes, an old one is not
taken for it. The compiler is not in it: a library may be brought to a machine that has none. The cache is
$KERNELS_PALLAS_CACHE, or ~/.cache/kernels_pallas.
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
    """Of $CXX, c++ and g++, or nvcc, the one that is here."""
    names = (os.environ.get("CXX"), "c++", "g++") if library == "cpu" else ("nvcc",)
    return next((found for name in names if name and (found := shutil.which(name))), None)


def cutlass_headers() -> Path | None:
    """The folder of CUTLASS's headers: $CUTLASS_PATH/include, or that of the package nvidia-cutlass; None without."""
    if told := os.environ.get("CUTLASS_PATH"):
        folders = [Path(told, "include")]
    else:
        spec = importlib.util.find_spec("cutlass_library")  # not imported: it takes a second, and compiles nothing
        folders = [Path(f, "source", "include") for f in (spec and spec.submodule_search_locations) or ()]
    return next((folder for folder in folders if (folder / "cutlass" / "version.h").exists()), None)


def missing(library: str) -> str | None:
    """None where this machine can compile it, else what to install."""
    if compiler(library) is None:
        return f"no compiler for {library} on PATH; install {'g++' if library == 'cpu' else 'nvcc'}."
    if library == "cutlass" and cutlass_headers() is None:
        return "no CUTLASS headers; pip install --no-deps nvidia-cutlass, or set CUTLASS_PATH to a checkout."
    return None


def built(library: str) -> Path:
    """Where the library of today's sources lies, once it is built."""
    digest = hashlib.sha256(f"{platform.machine()} {version('jaxlib')} {_options(library)}".encode())
    for path in _sources(library):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    if library == "cutlass" and (headers := cutlass_headers()):
        digest.update((headers / "cutlass" / "version.h").read_bytes())
    cache = os.environ.get("KERNELS_PALLAS_CACHE") or Path.home() / ".cache" / "kernels_pallas"
    return Path(cache) / f"custom_calls_{library}_{digest.hexdigest()[:16]}.so"


def build(library: str) -> Path:
    """The library, compiled if it is not there.

    Raises:
      RuntimeError: there is no compiler or are no headers, or what the compiler said first.
      OSError: the cache cannot be written.
    """
    path = built(library)
    if path.exists():
        return path
    if reason := missing(library):
        raise RuntimeError(reason)
    program = str(compiler(library))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # others may build it too: the last one stays
        unfinished = Path(folder, path.name)
        done = subprocess.run([*_command(library, program), "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
            raise RuntimeError(f"{program} failed: {(errors or ['it says nothing'])[0]}")
        unfinished.replace(path)
    return path


def _command(library: str, program: str) -> list[str]:
    files = [str(source) for source in _sources(library) if source.suffix == (".cc" if library == "cpu" else ".cu")]
    headers = [jax.ffi.include_dir(), *([str(cutlass_headers())] if library == "cutlass" else [])]
    includes = [word for folder in headers for word in ("-isystem", folder)]
    return [program, *_options(library), *includes, *files]


def _options(library: str) -> tuple[str, ...]:
    if library == "cpu":
        return (*COMMON, "-fPIC", "-ffp-contract=off")  # no product fused with a sum: the same to the bit everywhere
    target = lambda each: f"-gencode=arch=compute_{each},code=sm_{each}"
    if library == "cutlass":  # without NDEBUG its kernels check themselves as they run
        return (*COMMON, "-Xcompiler", "-fPIC", "-DNDEBUG", "--expt-relaxed-constexpr", target("90a"))
    return (*COMMON, "-Xcompiler", "-fPIC", "--fmad=false", "-diag-suppress=20012", *map(target, ARCHITECTURES))


def _sources(library: str) -> list[Path]:
    return sorted(path for path in FOLDERS[library].iterdir() if path.suffix in (".h", ".cc", ".cu"))
