"""What the layouts begin with."""

import json
from pathlib import Path

import yaml

WORKER = Path(__file__).parents[1] / "workers" / "first_masters.py"
CASES = [(1, "bf16", None), (2, "bf16", "cpu"), (3, "bf16", None), (3, "bf16", "cpu"), (0, "fp32", None)]
FSDP2 = {"backend": "fsdp2", "zero_stage": None, "precision": "bf16"}


def test_masters_and_ema_begin_as_rank_0s_fp32_weights(launch, tmp_path, experiment):
    paths = []
    engines = [
        *(
            {"zero_stage": stage, "precision": precision, "offload_optimizer": offload}
            for stage, precision, offload in CASES
        ),
        FSDP2,
    ]
    for engine in engines:
        tree = experiment(engine=engine)
        paths.append(tmp_path / f"{len(paths)}.yaml")
        paths[-1].write_text(yaml.safe_dump(tree))
    launch(WORKER, 2, tmp_path / "wrong.json", *paths)
    assert json.loads((tmp_path / "wrong.json").read_text()) == [[]] * len(engines)
