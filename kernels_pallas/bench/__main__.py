"""`python -m kernels_pallas.bench`."""

import sys

from .main import main


sys.exit(main())
