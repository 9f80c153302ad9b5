"""`python -m kernels.bench`."""

import sys

from kernels.bench.timing import main

sys.exit(main())
