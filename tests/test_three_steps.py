"""The step under DeepSpeed against plain fp64 PyTorch that knows neither ranks nor factored targets."""

from pathlib import Path

import pytest
import torch
import yaml

WORKER = Path(__file__).parent / "workers" / "three_steps.py"
RANKS = 2
TOLERANCE = 1e-6  # relative; fp32 against fp64 was measured at 6e-8 for weights and 5e-8 for losses
PLAIN: dict[str, dict] = {}  # results of the plain implementation, computed once


def run(launch, tmp_path, mode, ranks, tree):
    path, out = tmp_path / f"{mode}.yaml", tmp_path / f"{mode}.pt"
    path.write_text(yaml.safe_dump(tree))
    launch(WORKER, ranks, mode, path, out, RANKS)
    return torch.load(out)


def plain(launch, tmp_path, tree):
    key = yaml.safe_dump({**tree, "engine": None})
    if key not in PLAIN:
        PLAIN[key] = run(launch, tmp_path, "plain", 1, tree)
    return PLAIN[key]


def relative_error(found, expected):
    difference = sum((found[n].double() - expected[n]).square().sum() for n in expected)
    return float((difference / sum(w.square().sum() for w in expected.values())).sqrt())


@pytest.mark.parametrize(
    ("family", "stage", "centering"),
    [
        ("vit", 0, "sinkhorn"),
        ("vit", 1, "sinkhorn"),
        ("vit", 2, "sinkhorn"),
        ("vit", 1, "softmax"),
        ("swin", 1, "sinkhorn"),
        ("resnet", 2, "sinkhorn"),
        *(
            pytest.param(family, stage, "sinkhorn", marks=pytest.mark.slow)
            for family, stage in [("swin", 0), ("swin", 2), ("resnet", 0), ("resnet", 1)]
        ),
    ],
)
def test_two_ranks_with_different_subnets_equal_one_plain_process(
    launch, tmp_path, experiment, family, stage, centering
):
    tree = experiment(
        family,
        loss={"centering": centering, "ibot_start_epoch": 0.5},  # the first step without masked patches
        sampling={"assignment": "independent"},
        engine={"zero_stage": stage, "activation_checkpointing": stage == 2},
    )
    expected = plain(launch, tmp_path, tree)
    found = run(launch, tmp_path, "engine", RANKS, tree)
    for step, losses in enumerate(expected["losses"]):
        for term, value in losses.items():
            assert found["losses"][step][term] == pytest.approx(value, rel=1e-5, abs=1e-6), (step, term)
    for branch in ("student", "teacher"):
        assert relative_error(found[branch], expected[branch]) < TOLERANCE
        assert relative_error(found["working"][branch], expected[branch]) < TOLERANCE
    for kind, centers in expected["center"].items():
        for ours, theirs in zip(found["center"][kind], centers, strict=True):
            assert torch.allclose(ours.double(), theirs, atol=1e-6)


def test_bf16_follows_fp32_within_rounding(launch, tmp_path, experiment):
    tree = experiment(loss={"ibot_start_epoch": 0.5}, sampling={"assignment": "independent"})
    expected = plain(launch, tmp_path, tree)
    tree["engine"] |= {"zero_stage": 2, "precision": "bf16"}
    found = run(launch, tmp_path, "engine", RANKS, tree)
    for step, losses in enumerate(expected["losses"]):
        assert found["losses"][step]["total"] == pytest.approx(losses["total"], rel=0.02)
    assert relative_error(found["student"], expected["student"]) < 0.02
    for name, master in found["teacher"].items():  # the teacher is the rounded fp32 EMA, to the bit
        assert torch.equal(found["working"]["teacher"][name], master.bfloat16())


def test_interpreted_triton_kernels_train_like_the_eager_ones(launch, tmp_path, experiment, monkeypatch):
    tree = experiment(  # the interpreter is slow: one step, its update at the full learning rate
        model={"image_size": 16, "width": {"min": 16, "max": 32, "step": 16}, "depth": {"min": 1, "max": 2, "step": 1}},
        heads={"prototypes": [24], "hidden_dim": 32, "bottleneck_dim": 16},
        loss={"ibot_start_epoch": 0},
        data={"batch_size": 2, "global_crops": {"size": 16}, "local_crops": {"count": 1, "size": 8}},
        optim={"warmup_epochs": 0, "freeze_prototypes_epochs": 0},
        run={"max_steps": 1},
    )
    eager = run(launch, tmp_path, "engine", 1, tree)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tree["engine"]["kernels"] = "triton"
    triton = run(launch, tmp_path, "engine", 1, tree)
    for ours, theirs in zip(triton["losses"], eager["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    for branch in ("student", "teacher"):  # one update, so the gradients agree
        expected = {name: weight.double() for name, weight in eager[branch].items()}
        assert relative_error(triton[branch], expected) < TOLERANCE
