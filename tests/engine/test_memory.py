"""What a rank holds between steps at each ZeRO stage and under FSDP2, against the plan's estimate."""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config
from pipeline.plan.plan import memory_estimate

WORKER = Path(__file__).parents[1] / "workers" / "held_memory.py"
RANKS = 2


STAGES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (3, "fp32"), (3, "bf16")]
FSDP2 = {
    "keep": {"reshard_after_forward": False},
    "reshard": {"reshard_after_forward": True},
    "one": {"shard_size": "one"},
}
CASES = [*STAGES, *((kind, "bf16") for kind in FSDP2)]


def tree_of(experiment, stage, precision):
    own = {"backend": "fsdp2", "zero_stage": None, **FSDP2[stage]} if stage in FSDP2 else {"zero_stage": stage}
    return experiment(
        engine={**own, "precision": precision},
        heads={"prototypes": [4096], "hidden_dim": 512, "bottleneck_dim": 256},  # so that crops count for little
    )


@pytest.fixture(scope="module")
def held(launch, experiment, tmp_path_factory):
    """By case, the bytes that rank 0 held and the config."""
    directory = tmp_path_factory.mktemp("memory")
    paths = [directory / f"{stage}-{precision}.yaml" for stage, precision in CASES]
    for path, case in zip(paths, CASES, strict=True):
        path.write_text(yaml.safe_dump(tree_of(experiment, *case)))
    launch(WORKER, RANKS, directory / "held.json", *paths)
    return dict(zip(CASES, zip(json.loads((directory / "held.json").read_text()), paths, strict=True), strict=True))


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_state_of_a_rank_is_what_the_plan_says(held, stage, precision):
    found, path = held[stage, precision]
    planned = memory_estimate(load_config(path), RANKS)
    state = planned["weights (student, teacher)"] + planned["fp32 master, AdamW, EMA"]
    if stage == 3:  # its gradients have a place of their own, below that gradients are gone between steps
        state += planned["gradients"]
    assert found == pytest.approx(state, rel=0.1)
