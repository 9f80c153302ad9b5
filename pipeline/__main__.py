"""`python -m pipeline` is `poa`."""

import os
import sys

# `-m` puts the working directory first, where a select.py or a yaml/ of the user's would stand in for what we import
if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from pipeline.cli import main

sys.exit(main())
