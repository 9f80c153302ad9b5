"""As `subprocess.Popen` starts `python -m MODULE ARGUMENT...` in a session of its own: ENVIRONMENT.json MODULE ..."""

import json
import os
import runpy
import sys
from pathlib import Path

environment, module, *words = sys.argv[1:]
os.setsid()
os.environ.clear()
os.environ.update(json.loads(Path(environment).read_text()))
sys.argv = [module, *words]  # the first is set to the module's file
runpy.run_module(module, run_name="__main__", alter_sys=True)
