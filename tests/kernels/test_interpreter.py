"""All kernel tests once more with `impl="triton"`, run by Triton's interpreter on the CPU.

The interpreter has to be chosen before Triton is imported, so each file gets a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.dispatch import interpreted

HERE = Path(__file__).parent


@pytest.mark.timeout(900)
@pytest.mark.skipif(interpreted(), reason="this process is interpreted already")
@pytest.mark.parametrize(
    "name", ["distillation", "sinkhorn", "attention", "optimizer", "residual", "colours", "operators", "package"]
)
def test_triton_kernels_pass_under_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"test_{name}.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout), run.stdout
