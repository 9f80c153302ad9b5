"""What a step asks of the device and of the network at each ZeRO stage and under FSDP2, exactly.

DeepSpeed's own step would wait for the whole device 3 times (its throughput timer) and search bf16 gradients for inf
and NaN once more. With a vector per learning rate, 15 of them here, there were 30 gathers and an all-reduce of all
gradients at stages 1 and 2, 19 all-reduces at stage 3, and 15 reads of AdamW's counters beside that where ranks agree.
"""

import json
from pathlib import Path

import pytest
import yaml
from step_counts import BUCKET

WORKER = Path(__file__).parents[1] / "workers" / "step_counts.py"
RANKS = 2
ENGINES = {
    **{stage: {"zero_stage": stage} for stage in range(4)},
    "keep": {"backend": "fsdp2", "zero_stage": None, "reshard_after_forward": False},
    "reshard": {"backend": "fsdp2", "zero_stage": None, "reshard_after_forward": True},
}
CASES = [  # stage or what FSDP2 does after a forward pass, precision of weights, and of gradients on their way
    *((stage, "fp32", "fp32") for stage in range(4)),
    *((stage, "bf16", "fp32") for stage in (1, 2, 3)),
    (0, "fp32", "bf16"),
    *((stage, "bf16", "bf16") for stage in (1, 2, 3)),
    *((kind, *precisions) for kind in ("keep", "reshard") for precisions in (("fp32", "fp32"), ("bf16", "fp32"))),
    ("reshard", "bf16", "bf16"),
]

UNIFORM = ("vit", "swin")  # families with one learning rate for all layers, and so few groups


@pytest.fixture(scope="module")
def counts(launch, experiment, tmp_path_factory):
    """By case, what each rank counted in a step."""
    directory = tmp_path_factory.mktemp("counts")
    paths = []
    for stage, precision, reduced in CASES:
        engine = {**ENGINES[stage], "precision": precision, "reduce_dtype": reduced}
        tree = experiment(engine=engine, loss={"ibot_start_epoch": 0})
        paths.append(directory / f"{stage}-{precision}-{reduced}.yaml")
        paths[-1].write_text(yaml.safe_dump(tree))
    for family in UNIFORM:
        tree = experiment(family, optim={"layer_decay": 1.0, "patch_embed_lr_scale": 1.0})
        paths.append(directory / f"{family}.yaml")
        paths[-1].write_text(yaml.safe_dump(tree))
    launch(WORKER, RANKS, directory / "counts.json", *paths)
    return dict(zip([*CASES, *UNIFORM], json.loads((directory / "counts.json").read_text()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_host_waits_for_nothing_in_a_step_and_reads_its_values_once_afterwards(counts, case):
    for found in counts[case]:
        assert found["waits"] == {}
        assert found["waits afterwards"] == {"tolist": 1}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_collectives_of_a_step_and_what_they_carry(counts, case):
    stage, precision, reduced = case
    for found in counts[case]:
        assert found == counts[case][0]  # ranks of different sub-networks
        weights, gradients = (found["weights"] * (2 if dtype == "bf16" else 4) for dtype in (precision, reduced))
        calls, carried, buckets = found["collectives"], found["bytes"], -(-found["weights"] // BUCKET)
        agreed = carried["allreduce"] - (gradients if stage == 0 else 0)  # what is not gradients
        if stage == 0:  # gradients once; three iterations of Sinkhorn-Knopp, and `agree`
            assert calls == {"allreduce": buckets + 4}
        elif stage in ("keep", "reshard"):  # 4 blocks, 2 heads, the rest
            passes, units = 2 if stage == "reshard" else 1, 7
            student = 4 * units if stage == "reshard" else units
            assert calls == {
                "allreduce": 4,
                "reduce_scatter_base": passes * units,
                "allgather_base": student + units,
            }
            assert carried["reduce_scatter_base"] == passes * gradients
            assert carried["allgather_base"] == (student + units) // units * weights
        elif stage < 3:  # gradients once or in each of two passes; student and teacher
            passes = 1 if stage == 1 else 2
            assert calls == {
                "allreduce": 4,
                "reduce_scatter_base": passes * buckets,
                "allgather_base": 2 * buckets,
            }
            assert carried["reduce_scatter_base"] == passes * gradients
            assert carried["allgather_base"] == 2 * weights
        else:
            assert calls == {"allgather_base": 92, "allreduce": 4, "reduce_scatter_base": 10}
            assert carried["reduce_scatter_base"] == 2 * gradients
            assert carried["allgather_base"] == 2 * weights
        assert agreed == 5752  # of that 8 bytes per term of the loss, twice: its sum, and whether it was finite


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in (0, 1, 2)], ids=str)
def test_gradients_and_weights_travel_while_the_rank_computes(counts, case):
    """By the order in which things begin and are waited for, whose times nobody takes."""
    stage = case[0]
    for found in counts[case]:
        n = -(-found["weights"] // BUCKET)
        assert n > 3
        arrive = [] if stage == 0 else [f"wait for {n}"]  # the last step's weights, where they are first used
        sent = ["allreduce" if stage == 0 else "reduce_scatter_base"]
        intact, elastic, rest = [], sent * n, n
        if stage == 2:  # two under way, those of the intact student while the elastic one computes
            held = [*sent, "wait for 1"]
            intact, elastic, rest = sent * 2 + held * (n - 2), held * n, 2
        targets, agreement, gathers = ["allreduce"] * 3, ["allreduce"], ["allgather_base"] * (2 * n if stage else 0)
        assert found["events"] == [
            *(*arrive, "teacher", *targets),
            *(*arrive, "student", "backward", *intact, "end"),
            *("student", "backward", *elastic, "end"),
            *(f"wait for {rest}", *agreement, *gathers),
        ]
        assert found["sent early"] == (2 if stage == 2 else 1) * (n - 1)  # all but the last bucket of a pass


@pytest.mark.parametrize("family", UNIFORM)
def test_small_parameters_of_all_layers_hold_up_no_bucket_of_weights(counts, family):
    for found in counts[family]:
        n = -(-found["weights"] // BUCKET)
        assert n > 3
        assert found["sent early"] == n - 1
