"""All widths are compiled before the first step, and training is then what it would have been."""

import io
import json
from pathlib import Path

import pytest
import yaml

from pipeline.run.console import Console

WORKER = Path(__file__).parents[1] / "workers" / "rehearsed.py"
ENGINES = {
    **{f"stage {stage}": {"zero_stage": stage} for stage in (0, 1, 3)},
    "fsdp2": {"zero_stage": None, "backend": "fsdp2"},
}


@pytest.fixture(scope="module")
def results(launch, experiment, tmp_path_factory):
    """Per rank and engine: (as training draws them, rehearsed); only stage 0 compiles what it draws."""
    directory = tmp_path_factory.mktemp("rehearsed")
    for name, engine in ENGINES.items():
        narrow = {} if name == "stage 0" else {"width": {"min": 48, "max": 64, "step": 16}}  # a graph less to compile
        model = {"drop_path": 0.3} | narrow
        tree = experiment(engine={**engine, "compile": True}, loss={"centering": "softmax"}, model=model)
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    launch(WORKER, 2, directory / "out.json", *(directory / f"{name}.yaml" for name in ENGINES))
    return json.loads((directory / "out.json").read_text())


@pytest.mark.parametrize("index", range(len(ENGINES)), ids=[*ENGINES])
def test_a_rehearsed_run_compiles_nothing_in_its_steps_and_changes_no_bit(results, index):
    for rank in results:
        drawn, rehearsed = rank[index]
        assert drawn["before"] == 0
        assert (drawn["during"] > 0) == (index == 0)
        assert rehearsed["during"] == 0 < rehearsed["before"]
        assert rehearsed["losses"] == drawn["losses"]


def test_the_ranks_of_a_node_begin_with_different_widths(results):
    assert [rank[0][1]["told"] for rank in results] == [
        [[1, 3, 32], [2, 3, 48], [3, 3, 64]],
        [[1, 3, 48], [2, 3, 64], [3, 3, 32]],
    ]


def test_a_batch_log_says_that_it_compiles_and_how_long_that_took():
    stream = io.StringIO()
    console = Console(speaks=True, last_step=9, first_step=0, stream=stream)
    for number in (1, 2, 3):
        console.compiling(number, 3, 16 + 16 * number)
    console.compiled(3)
    assert stream.getvalue() == "compiling width 32 (1 of 3)\n3 widths are compiled, in 0 s\n"
