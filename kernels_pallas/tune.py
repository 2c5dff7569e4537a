"""`python -m kernels_pallas.tune`: the command in bench/tune.py."""

import sys

from .bench.tune import main


if __name__ == "__main__":
    sys.exit(main())
