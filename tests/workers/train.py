"""`poa train` with these arguments."""

import sys

from pipeline.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
