"""What the layouts begin with, and the optimizer that they share."""

import json
from pathlib import Path

import torch
import yaml

from pipeline.engine.layouts import AdamW

WORKER = Path(__file__).parents[1] / "workers" / "first_masters.py"
CASES = [(1, "bf16", None), (2, "bf16", "cpu"), (3, "bf16", None), (3, "bf16", "cpu"), (0, "fp32", None)]


def test_masters_and_ema_begin_as_rank_0s_fp32_weights(launch, tmp_path, experiment):
    paths = []
    for stage, precision, offload in CASES:
        tree = experiment(engine={"zero_stage": stage, "precision": precision, "offload_optimizer": offload})
        paths.append(tmp_path / f"{len(paths)}.yaml")
        paths[-1].write_text(yaml.safe_dump(tree))
    launch(WORKER, 2, tmp_path / "wrong.json", *paths)
    assert json.loads((tmp_path / "wrong.json").read_text()) == [[]] * len(CASES)


def test_adamw_without_wrappers_updates_like_torchs_own():
    def train(kind):
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(n, generator=generator).requires_grad_() for n in (7, 3)]
        optimizer = kind(
            [{"params": [w], "lr": lr} for w, lr in zip(weights, (0.1, 0.01), strict=True)], weight_decay=0.1
        )
        for _ in range(3):
            optimizer.zero_grad()
            sum((w - 1).square().sum() for w in weights).backward()
            optimizer.step()
        return weights, [optimizer.state[w] for w in weights]

    (ours, our_state), (theirs, their_state) = train(AdamW), train(torch.optim.AdamW)
    for a, b, mine, other in zip(ours, theirs, our_state, their_state, strict=True):
        assert torch.equal(a, b)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
