"""What a step asks of the device and of the network, exactly, at each ZeRO stage."""

import json
from pathlib import Path

import yaml

WORKER = Path(__file__).parents[1] / "workers" / "step_counts.py"
CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


def test_counts(launch, tmp_path, experiment):
    for stage, precision in CASES:
        tree = experiment(engine={"zero_stage": stage, "precision": precision}, loss={"ibot_start_epoch": 0})
        (tmp_path / f"{stage}-{precision}.yaml").write_text(yaml.safe_dump(tree))
    launch(WORKER, 2, tmp_path / "counts.json", *(tmp_path / f"{s}-{p}.yaml" for s, p in CASES))
    for case, found in zip(CASES, json.loads((tmp_path / "counts.json").read_text())):
        print(case, found)
