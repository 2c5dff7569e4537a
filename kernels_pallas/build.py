"""Compiles the custom calls of csrc/, for the CPU or for NVIDIA GPUs, into a cache (libraries.py).

    python -m kernels_pallas.build            what this machine has compilers for
    python -m kernels_pallas.build cuda       needs nvcc, no GPU

Nothing here is needed to import the package: where a library is missing, `unsupported` says how to make it.
"""

import argparse
import sys

from .libraries import PLATFORMS, build, compiler


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser("python -m kernels_pallas.build", description="Compiles csrc/'s custom calls.")
    parser.add_argument("platform", nargs="*", help=f"of {', '.join(PLATFORMS)}; default: those with a compiler here")
    wanted = parser.parse_args().platform
    if unknown := [name for name in wanted if name not in PLATFORMS]:
        parser.error(f"no platform {unknown[0]!r}; choose from {', '.join(PLATFORMS)}.")
    possible = [name for name in PLATFORMS if compiler(name)]
    if not (wanted or possible):
        print("build: neither a C++ compiler nor nvcc is on PATH; install one.", file=sys.stderr)
        return 1
    for platform in wanted or possible:
        try:
            print(build(platform))
        except RuntimeError as error:
            print(f"build: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
