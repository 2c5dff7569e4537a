"""`python -m kernels_pallas.inspect`: cross-compiles kernels, reports registers and spills; see bench/inspect.py."""

from .bench import command_line
from .bench.inspect import main


if __name__ == "__main__":
    command_line.run("inspect", main)
