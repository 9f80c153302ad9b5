"""Trains once per config, in forks of one process, and prints what each has imported: imported.py CONFIG..."""

import json
import os
import sys

import pipeline.run.loop
from pipeline.config import load_config

for config in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        code = pipeline.run.loop.train(load_config(config), quiet=True)
        print(json.dumps({"code": code, "modules": sorted(sys.modules)}), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
