"""What a step asks of the device and of the network at each ZeRO stage, exactly.

With DeepSpeed's own settings a step waited for the whole device 3 times (its throughput timer), in bf16 at stages 1 and
2 it searched the gradients for inf and NaN once more: one all-reduce and one `item`.
"""

import json
from pathlib import Path

import pytest
import yaml

WORKER = Path(__file__).parents[1] / "workers" / "step_counts.py"
RANKS = 2
CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.fixture(scope="module")
def counts(launch, experiment, tmp_path_factory):
    """By case, what each rank counted in a step."""
    directory = tmp_path_factory.mktemp("counts")
    paths = []
    for stage, precision in CASES:
        tree = experiment(engine={"zero_stage": stage, "precision": precision}, loss={"ibot_start_epoch": 0})
        paths.append(directory / f"{stage}-{precision}.yaml")
        paths[-1].write_text(yaml.safe_dump(tree))
    launch(WORKER, RANKS, directory / "counts.json", *paths)
    return dict(zip(CASES, json.loads((directory / "counts.json").read_text()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_waits_for_the_device_where_ranks_agree_and_nowhere_else(counts, case):
    for found in counts[case]:
        assert found["synchronize"] == 0
        # AdamW reads the step count of every vector (under ZeRO-0 parameter); the fused one of a GPU does not
        assert found["item"] == (15 if case[0] else 77)
        assert found["tolist"] == 1  # `agree`


@pytest.mark.parametrize("case", CASES, ids=str)
def test_collectives_of_a_step_and_what_they_carry(counts, case):
    stage, precision = case
    for found in counts[case]:
        assert found == counts[case][0]  # ranks of different sub-networks
        weights = found["weights"] * (2 if precision == "bf16" else 4)
        calls, carried = found["collectives"], found["bytes"]
        agreed = carried["allreduce"] - (weights if stage < 3 else 0)  # what is not gradients
        if stage == 0:  # gradients in one bucket; three iterations of Sinkhorn-Knopp, and `agree`
            assert calls == {"allreduce": 5}
        elif stage < 3:  # then student and teacher, a vector for each of 15 parameter groups
            assert calls == {"allreduce": 5, "allgather_base": 30}
            assert carried["allgather_base"] == 2 * weights
        else:
            assert calls == {"allgather_base": 92, "allreduce": 19, "reduce_scatter_base": 10}
            assert carried["allgather_base"] == carried["reduce_scatter_base"] == 2 * weights
        assert agreed == (5848 if stage == 3 else 5728)
