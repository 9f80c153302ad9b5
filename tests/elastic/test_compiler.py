"""The compiler is put off, not away."""

import json
from pathlib import Path

import pytest

WORKERS = Path(__file__).parents[1] / "workers"


@pytest.mark.runs
def test_what_was_decorated_meanwhile_is_compiled_or_not_when_it_is_called(launch):
    (output,) = launch(WORKERS / "deferred_compiler.py", 1, fresh=True)
    assert json.loads(output.strip().splitlines()[-1]) == {
        "disabled before": False,
        "imported within": False,
        "restored": True,
        "imported after": False,
        "name": "compiled",
        "compiled": [True, 2.0, True],
        "disabled in what is compiled": [False, True],
        "asked": True,
        "nothing to defer": True,
    }


@pytest.mark.runs
def test_who_needs_more_of_the_compiler_gets_it(launch):
    (output,) = launch(WORKERS / "deferred_compiler_in_use.py", 1, fresh=True)
    same, file = output.split()
    assert same == "True"
    assert file.endswith("utils.py")
