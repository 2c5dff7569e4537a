"""`python -m kernels_pallas.build`: compiles the FFI custom calls; the code is in ffi/build.py."""

from .bench import command_line
from .ffi.build import main


if __name__ == "__main__":
    command_line.run("build", main)
