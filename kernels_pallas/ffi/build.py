"""Compiles the custom calls of csrc/, for the CPU or for NVIDIA GPUs, into a cache (libraries.py).

    python -m kernels_pallas.build            what this machine has compilers and headers for
    python -m kernels_pallas.build cuda       needs nvcc, no GPU
    python -m kernels_pallas.build cutlass    needs nvcc and the package nvidia-cutlass; takes minutes

Nothing here is needed to import the package: where a library is missing, `unsupported` says how to make it.
"""

import argparse
import sys

from .libraries import LIBRARIES, build, missing


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser("python -m kernels_pallas.build", description="Compiles csrc/'s custom calls.")
    parser.add_argument(
        "libraries", nargs="*", help=f"of {', '.join(LIBRARIES)}; default: those that can be built here"
    )
    options = parser.parse_args()
    wanted: list[str] = options.libraries
    if unknown := [name for name in wanted if name not in LIBRARIES]:
        parser.error(f"no library {unknown[0]!r}; choose from {', '.join(LIBRARIES)}.")
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


if __name__ == "__main__":
    sys.exit(main())
