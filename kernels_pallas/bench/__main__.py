"""`python -m kernels_pallas.bench`: benchmarks the operations; the code is in main.py."""

from . import command_line
from .main import main


command_line.run("bench", main)
