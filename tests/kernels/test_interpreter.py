"""All kernel tests once more with `impl="triton"`, run by Triton's interpreter on the CPU.

The interpreter has to be chosen before Triton is imported, so they get a process of their own, forked from one that has
imported it so.
"""

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kernels.dispatch import interpreted

HERE = Path(__file__).parent
WORKER = HERE.parent / "workers" / "run_tests.py"


@pytest.fixture(scope="module")
def cases(
    launch: Callable[..., list[str]], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list]:
    """By file, what became of its tests; of the files that the selected tests ask for."""
    own = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = [item.callspec.params["name"] for item in own]
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    files = [str(HERE / f"test_{name}.py") for name in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        launch(WORKER, 1, "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files, timeout=1700)
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
