"""What `pipeline.engine.private` uses of DeepSpeed's insides is there; a version that drops a name fails here by it."""

from pathlib import Path

import pytest
from deepspeed import ops
from deepspeed.comm import comm
from deepspeed.runtime import engine
from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2

from pipeline.engine import private

PLACES = [
    (private.OPERATORS, ops),
    (private.COMM, comm),
    (private.ENGINE, engine),
    (private.FLAT, stage_1_and_2),
    (private.CUT_UP, stage3),
    (private.PARAMETER, stage3),
    (private.SHARD, partition_parameters),
    (private.TEACHER, stage3),
]
NAMES = [(name, place) for names, place in PLACES for name in names]


@pytest.mark.parametrize(("name", "place"), NAMES, ids=[name for name, _ in NAMES])
def test_deepspeed_has(name, place):
    assert name in Path(place.__file__).read_text()


@pytest.mark.parametrize("name", [name for name, _ in NAMES])
def test_what_is_listed_is_used(name):
    assert Path(private.__file__).read_text().count(name) > 1
