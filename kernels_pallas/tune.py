"""`python -m kernels_pallas.tune`: autotunes block sizes; the code is in bench/tune.py."""

from .bench import command_line
from .bench.tune import main


if __name__ == "__main__":
    command_line.run("tune", main)
