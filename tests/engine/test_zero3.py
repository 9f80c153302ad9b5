"""What ZeRO-3, and FSDP2 that reshards, are for: no rank holds a whole network.

That they train the same is in `test_three_steps`.
"""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.files import read_json_lines

BUDGET = 800_000_000  # bytes; stage 3 does with 650 million, stage 0 with 1,000, and not with 900
FSDP2 = {"backend": "fsdp2", "zero_stage": None, "reshard_after_forward": True}
WORKERS = Path(__file__).parents[1] / "workers"


def test_no_weight_stays_gathered_between_forward_and_backward(launch, tmp_path, experiment):
    configs = []
    for family in ("vit", "eva", "swin", "thin_resnet"):
        for name, engine in (("zero3", {"zero_stage": 3}), ("fsdp2", FSDP2)):
            data = {"batch_size": 2}
            tree = experiment(family, engine=engine, data=data, sampling={"assignment": "independent"})
            configs.append(tmp_path / f"{family}-{name}.yaml")
            configs[-1].write_text(yaml.safe_dump(tree))
    launch(WORKERS / "gathered_weights.py", 2, tmp_path / "alive.json", *configs)
    alive = json.loads((tmp_path / "alive.json").read_text())
    assert alive == {path.stem: [[]] * 4 for path in configs}


def test_a_network_too_large_for_a_rank_trains(launch, tmp_path, experiment):
    """Stages 0 and 3 of 32 million parameters within the same limit of the operating system."""
    tree = experiment(
        model={
            "image_size": 16,
            "head_dim": 64,
            "width": {"min": 256, "max": 512, "step": 256},
            "depth": {"min": 9, "max": 10, "step": 1},
        },
        data={"batch_size": 1, "global_crops": {"size": 16}, "local_crops": {"count": 1, "size": 8}},
        loss={"koleo_weight": 0.0},
    )
    for stage in (0, 3):
        tree["engine"]["zero_stage"] = stage
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(AssertionError, match=r"allocate memory|bad_alloc"):
        launch(WORKERS / "limited_memory.py", 2, tmp_path / "0.yaml", BUDGET)
    launch(WORKERS / "limited_memory.py", 2, tmp_path / "3.yaml", BUDGET)


def test_online_evaluation_sees_the_whole_teacher(launch, tmp_path, experiment, digits):
    shards = {"train": str(digits / "train-000000.tar"), "val": str(digits / "val-000000.tar")}
    tree = experiment(eval={"every_steps": 2, **shards}, run={"max_steps": 4}, sampling={"assignment": "independent"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    found = {}
    engines = {1: ["zero_stage=1"], 3: ["zero_stage=3"], "fsdp2": ["zero_stage=null", "backend=fsdp2"]}
    for stage, engine in engines.items():
        keys = [f"run.dir={tmp_path / str(stage)}", *(f"engine.{key}" for key in engine)]
        launch(WORKERS / "record_positions.py", 2, tmp_path / "records", tmp_path / "config.yaml", *keys)
        found[stage] = read_json_lines(tmp_path / str(stage) / "eval" / "online_knn.jsonl")
    assert len(found[1]) == 2
    for one, three, fsdp2 in zip(*found.values(), strict=True):
        assert three == pytest.approx(one, abs=0.01)
        assert fsdp2 == pytest.approx(one, abs=0.01)  # three of the 359 images, for rounding
