"""`python -m kernels_pallas.inspect`: the command in bench/inspect.py."""

import sys

from .bench.inspect import main


if __name__ == "__main__":
    sys.exit(main())
