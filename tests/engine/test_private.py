"""What `pipeline.engine.private` uses of DeepSpeed's insides is there; a version that drops a name fails here by it."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.engine import private

DEEPSPEED = Path(find_spec("deepspeed").origin).parent  # read and not imported, which takes seconds
PLACES = [
    (private.OPERATORS, "ops/__init__.py"),
    (private.COMM, "comm/comm.py"),
    (private.ENGINE, "runtime/engine.py"),
    (private.FLAT, "runtime/zero/stage_1_and_2.py"),
    (private.CUT_UP, "runtime/zero/stage3.py"),
    (private.PARAMETER, "runtime/zero/stage3.py"),
    (private.SHARD, "runtime/zero/partition_parameters.py"),
    (private.TEACHER, "runtime/zero/stage3.py"),
]
NAMES = [(name, place) for names, place in PLACES for name in names]


@pytest.mark.parametrize(("name", "place"), NAMES, ids=[name for name, _ in NAMES])
def test_deepspeed_has(name, place):
    assert name in (DEEPSPEED / place).read_text()


@pytest.mark.parametrize("name", [name for name, _ in NAMES])
def test_what_is_listed_is_used(name):
    assert Path(private.__file__).read_text().count(name) > 1
