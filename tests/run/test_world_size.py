"""A run that goes on with another number of ranks, another ZeRO stage and another engine continues the same run."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pipeline.engine.saved import load_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

WORKER = Path(__file__).parents[1] / "workers" / "record_positions.py"
GLOBAL_BATCH = 32
# ranks, ZeRO stage or FSDP2, last step: 4 -> 2 -> 1 -> 2
HISTORY = [(4, 2, 4), (2, 3, 8), (1, 0, 11), (2, "fsdp2", 14)]
STEPS = HISTORY[-1][-1]


@pytest.fixture
def train(launch, tmp_path, digits, experiment):
    """Train up to a step with so many ranks; every rank appends the records it was given."""
    shard = digits / "train-000002.tar"
    tree = experiment(
        model={"depth": {"min": 2, "max": 3, "step": 1}},
        data={"train": str(shard), "local_crops": {"count": 1, "size": 16}},
        loss={"koleo_group": 4, "ibot_start_epoch": 7},  # masks are drawn per rank, all else is of the global batch
        sampling={"assignment": "shared"},
        optim={"epochs": 7},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))

    def run(name: str, ranks: int, stage: int | str, last_step: int) -> None:
        keys = {
            "run.dir": tmp_path / name,
            "run.max_steps": last_step,
            "engine.backend": "fsdp2" if stage == "fsdp2" else "deepspeed",
            "engine.zero_stage": "null" if stage == "fsdp2" else stage,
            "data.batch_size": GLOBAL_BATCH // ranks,
        }
        overrides = [f"{key}={value}" for key, value in keys.items()]
        launch(WORKER, ranks, tmp_path / f"{name}.records", tmp_path / "config.yaml", *overrides, timeout=600)

    return run


def test_history_of_4_2_1_2_ranks_equals_an_undisturbed_run_and_sees_every_sample_once(train, tmp_path):
    for ranks, stage, last_step in HISTORY:
        train("history", ranks, stage, last_step)
    train("undisturbed", 2, 1, STEPS)

    found, expected = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("history", "undisturbed")
    )
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["images"] == theirs["images"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-3)
    for branch in ("teacher", "student"):
        ours, theirs = (load_weights(tmp_path / name / "checkpoints", branch)[0] for name in ("history", "undisturbed"))
        for key, weight in theirs.items():
            different = (ours[key] - weight).abs()
            if key.endswith("qkv.bias"):
                # softmax cancels a shift of all keys: their bias has no gradient but rounding, which Adam blows up
                different = different.view(3, -1)[[0, 2]]
            assert different.max() < 1e-5, key

    manifest = json.loads((tmp_path / "history" / "manifest.json").read_text())
    assert [start["world_size"] for start in manifest["starts"]] == [4, 2, 1, 2]
    samples = manifest["data"]["samples"]
    assert samples < GLOBAL_BATCH * STEPS  # the history covers an epoch
    given = [int(record) for path in tmp_path.glob("history.records.*") for record in path.read_text().split()]
    times = Counter(given)
    repeated = GLOBAL_BATCH * STEPS - samples  # the beginning of the second epoch
    assert len(times) == samples
    assert Counter(times.values()) == {1: samples - repeated, 2: repeated}
