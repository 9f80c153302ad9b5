"""The preset's own combination from the first step to a timm model: bf16, Triton, compiled, iBOT, several ranks.

Each of them is tested alone elsewhere. No GPU is needed: Triton's interpreter runs the kernels. Sizes alone are not
the preset's.
"""

import json
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from launcher import unused_port

from pipeline.cli import main
from pipeline.engine.saved import load_weights
from pipeline.files import read_json_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "workers" / "histories.py"
PRESET = ROOT / "yaml" / "vit_base_8gpu.yaml"
GLOBAL_BATCH = 4
ENGINES = {"zero1": [], "fsdp2": ["engine.backend=fsdp2", "engine.zero_stage=null"]}
STEPS = {"zero1": 3, "fsdp2": 2}  # the last one on one rank, those before it on two
# bf16 holds a cosine to 2**-8, over the temperature a logit to ten times that, and a cross-entropy changes by at most
# twice what its logits do
CROSS_ENTROPY = 2 * 2**-8 / 0.1
PLAIN = ["engine.kernels=eager", "engine.compile=false"]
KINDS = {"preset": [], "plain": PLAIN, "exact": [*PLAIN, "engine.precision=fp32"]}
SMALL = [
    *("model.image_size=16", "model.patch_size=8", "model.head_dim=16", "model.drop_path=0.25", "model.layer_scale=1"),
    *("model.width={min: 16, max: 32, step: 16}", "model.depth={min: 1, max: 2, step: 1}"),
    *("heads={prototypes: [24, 40], hidden_dim: 32, bottleneck_dim: 16}", "loss.ibot_start_epoch=0"),
    *("data.threads=1", "data.global_crops.size=16", "data.local_crops={count: 1, size: 8}"),
    *("optim.steps_per_epoch=2", "optim.warmup_epochs=0", "optim.freeze_prototypes_epochs=0"),
    *("run.log_every_steps=1", "metrics.port=0", "metrics.tensorboard=false"),
]


def attempts(directory: Path, shards: str, kinds: list[str]) -> list[dict]:
    """Of every kind and engine all steps but one on two ranks; then each goes on for the last on one."""
    plan = []
    for ranks in (2, 1):
        for kind, engine in product(kinds, ENGINES):
            words = {
                "data.train": shards,
                "run.dir": directory / f"{kind}-{engine}",
                "run.max_steps": STEPS[engine] - (ranks == 2),
                "data.batch_size": GLOBAL_BATCH // ranks,
            }
            overrides = [*SMALL, *KINDS[kind], *ENGINES[engine], *(f"{key}={value}" for key, value in words.items())]
            run = {"config": str(PRESET), "overrides": overrides, "ranks": ranks}
            plan.append(run | {"port": unused_port(), "backend": "eager"})
    return plan


@pytest.fixture(scope="module")
def runs(launch, digits, tmp_path_factory):
    """The directory of `KIND-ENGINE`, the run of each."""
    directory, shards = tmp_path_factory.mktemp("histories"), f"{digits}/train-{{000000..000002}}.tar"
    launch(WORKER, 2, json.dumps(attempts(directory, shards, ["plain", "exact"])), timeout=1200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        launch(WORKER, 2, json.dumps(attempts(directory, shards, ["preset"])), timeout=1200)
    return directory


def rows(run: Path) -> list[dict]:
    return list(read_json_lines(run / "metrics.jsonl"))


@pytest.mark.parametrize("engine", ENGINES)
def test_its_losses_are_those_of_plain_operators_on_two_ranks_and_after_it_went_on_with_one(runs, engine):
    found, exact = (rows(runs / f"{kind}-{engine}") for kind in ("preset", "exact"))
    assert [row["step"] for row in found] == [row["step"] for row in exact] == list(range(1, STEPS[engine] + 1))
    assert len({row["subnet"] for row in found}) == STEPS[engine]  # of rank 0
    for ours, theirs in zip(found, exact, strict=True):
        assert "bad" not in ours
        assert ours["subnet"] == theirs["subnet"]
        terms = [name for name in theirs if name.startswith(("dino", "ibot", "distill"))]
        assert len(terms) == 6
        for name in terms:
            assert ours[name] == pytest.approx(theirs[name], abs=CROSS_ENTROPY), (ours["step"], name)
        for name in ("koleo_intact", "koleo_elastic"):  # logarithms of distances, which are about 1
            assert ours[name] == pytest.approx(theirs[name], abs=2 * 2**-8 * 2), (ours["step"], name)
    starts = json.loads((runs / f"preset-{engine}" / "manifest.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_its_weights_are_no_farther_from_fp32_than_twice_those_of_plain_operators_in_bf16(runs, engine, branch):
    kinds = ("preset", "plain", "exact")
    ours, plain, exact = (load_weights(runs / f"{kind}-{engine}" / "checkpoints", branch)[0] for kind in kinds)
    assert 0 < distance(ours, exact) < 2 * distance(plain, exact)


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([(found[name] - weight).square().sum() for name, weight in exact.items()]).sum().sqrt())


@pytest.mark.parametrize("engine", ENGINES)
def test_timm_loads_what_is_extracted_of_it(runs, engine, tmp_path):
    assert main(["extract", str(runs / f"preset-{engine}"), "--subnet", "16x2", "--out", str(tmp_path)]) == 0
    (proof,) = tmp_path.rglob("proof.json")
    assert json.loads(proof.read_text())["max_abs_difference"] < 1e-5
    model = timm.create_model(f"local-dir:{proof.parent}", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 16)
