"""Where the custom calls of csrc/ lie once they are compiled, and how they are.

A library is named by a digest of the sources, of the command and of jaxlib's version: whatever changes, an old one is
not taken for it. The cache is $KERNELS_PALLAS_CACHE, or ~/.cache/kernels_pallas.
"""

import hashlib
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax


SOURCES = Path(__file__).parent / "csrc"
ARCHITECTURES = ("80", "90a", "100")  # Ampere, Hopper, Blackwell
PLATFORMS = ("cpu", "cuda")
COMMON = ("-std=c++17", "-O3", "-shared")


def compiler(platform: str) -> str | None:
    """Of $CXX, c++ and g++, or nvcc, the one that is here."""
    names = (os.environ.get("CXX"), "c++", "g++") if platform == "cpu" else ("nvcc",)
    return next((found for name in names if name and (found := shutil.which(name))), None)


def built(platform: str) -> Path:
    """Where the library of today's sources lies, once it is built."""
    digest = hashlib.sha256(f"{version('jaxlib')} {_options(platform)}".encode())
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    cache = os.environ.get("KERNELS_PALLAS_CACHE") or Path.home() / ".cache" / "kernels_pallas"
    return Path(cache) / f"custom_calls_{platform}_{digest.hexdigest()[:16]}.so"


def build(platform: str) -> Path:
    """The library, compiled if it is not there.

    Raises:
      RuntimeError: there is no compiler, or what it said first.
    """
    path = built(platform)
    if path.exists():
        return path
    program = compiler(platform)
    if program is None:
        raise RuntimeError(f"no compiler for {platform} on PATH; install {'g++' if platform == 'cpu' else 'nvcc'}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    files = [str(source) for source in _sources() if source.suffix == (".cc" if platform == "cpu" else ".cu")]
    command = [program, *_options(platform), "-isystem", jax.ffi.include_dir(), *files, "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
        raise RuntimeError(f"{program} failed: {(errors or ['it says nothing'])[0]}")
    unfinished.replace(path)
    return path


def _options(platform: str) -> tuple[str, ...]:
    if platform == "cpu":
        return (*COMMON, "-fPIC", "-ffp-contract=off")  # no product fused with a sum: the same to the bit everywhere
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in ARCHITECTURES]
    return (*COMMON, "-Xcompiler", "-fPIC", "--fmad=false", "-diag-suppress=20012", *targets)


def _sources() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cc", ".cu"))
