"""Builds the optional XLA FFI custom calls of csrc/, for the CPU or for NVIDIA GPUs, into a cache (libraries.py).

    python -m kernels_pallas.build            every library that this machine has a compiler and headers for
    python -m kernels_pallas.build cuda       needs nvcc, no GPU
    python -m kernels_pallas.build cutlass    needs nvcc and the package nvidia-cutlass; takes minutes

The package works without these libraries. The error message of an implementation that needs one names the command that
builds it.
"""

import argparse
import sys

from .libraries import LIBRARIES, build, missing


def main() -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser("python -m kernels_pallas.build", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "libraries",
        nargs="*",
        metavar="library",
        help=f"{', '.join(LIBRARIES)} (default: those that can be built on this machine)",
    )
    options = parser.parse_args()
    wanted: list[str] = options.libraries
    if unknown := [name for name in wanted if name not in LIBRARIES]:
        print(f"build: no library {unknown[0]!r}; choose from {', '.join(LIBRARIES)}.", file=sys.stderr)
        return 2
    possible = [name for name in LIBRARIES if not missing(name)]
    if not (wanted or possible):
        print("build: neither a C++ compiler nor nvcc is on PATH; install one.", file=sys.stderr)
        return 1
    for library in wanted or possible:
        try:
            print(build(library))
        except (RuntimeError, OSError) as error:
            print(f"build: {error}", file=sys.stderr)
            return 1
    return 0
