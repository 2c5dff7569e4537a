"""`python -m kernels_pallas.build`: the command in ffi/build.py."""

import sys

from .ffi.build import main


if __name__ == "__main__":
    sys.exit(main())
