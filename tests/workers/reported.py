"""Train, evaluate and report on a run by the commands, in a process that nothing launched: reported.py CONFIG RUN."""

import os
import sys

from pipeline.cli import main

for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]
config, run = sys.argv[1:]
code = main(["train", config, "--run-dir", run, "--quiet"])
assert code == 0, code
assert main(["eval", "knn", run, "--subnets", "all", "--json"]) == 0
assert main(["report", run]) == 0
