"""All kernel tests once more with `impl="triton"`, run by Triton's interpreter on the CPU.

The interpreter has to be chosen before Triton is imported, so they get a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kernels.dispatch import interpreted

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """By file, what became of its tests; of the files that the selected tests ask for."""
    own = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = [item.callspec.params["name"] for item in own]
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    files = [str(HERE / f"test_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout[-6000:] + run.stderr[-2000:]  # 1: a test failed, which is told below
    found: dict[str, list] = {name: [] for name in names}
    for case in ElementTree.parse(report).iter("testcase"):
        found[case.get("classname", "").rpartition(".test_")[2]].append(case)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(interpreted(), reason="this process is interpreted already")
@pytest.mark.parametrize(
    "name", ["distillation", "sinkhorn", "attention", "optimizer", "residual", "colours", "operators", "package"]
)
def test_triton_kernels_pass_under_the_interpreter(cases: dict[str, list], name: str) -> None:
    told = [(case, element) for case in cases[name] for element in case if element.tag in ("failure", "error")]
    wrong = [f"{case.get('name')}\n{element.text}" for case, element in told]
    assert not wrong, "\n".join(wrong)[-6000:]
    assert any(case.find("skipped") is None for case in cases[name])
