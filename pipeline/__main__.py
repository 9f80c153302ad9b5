"""`python -m pipeline` is `poa`."""

import sys

from pipeline.cli import main

sys.exit(main())
