"""What a network took, against counting by hand."""

import json

import pytest

from pipeline.config import ExperimentConfig, parse_config
from pipeline.elastic import cost
from pipeline.models.account import Ledger, Stretch, stretches
from pipeline.models.extract import extract
from pipeline.plan.forecast import GPUS, sampler, speed

BATCH = 4


def write(directory, starts, lines=(), **more):
    directory.mkdir(exist_ok=True)
    (directory / "manifest.json").write_text(json.dumps({"starts": starts, **more}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def start(step, ranks, time="2026-01-01T00:00:00Z"):
    return {"step": step, "world_size": ranks, "time": time}


@pytest.fixture
def config(experiment) -> ExperimentConfig:
    return parse_config(experiment("vit", sampling={"assignment": "independent"}))


def test_a_start_takes_back_what_lies_after_it(config):
    starts = [start(0, 4), start(6, 2), start(4, 1)]
    assert stretches(starts, 10, 8, config) == [Stretch(0, 4, 4, 2), Stretch(4, 10, 1, 8)]
    assert stretches([start(0, 2)], 3, None, config) == [Stretch(0, 3, 2, BATCH)]
    assert stretches([start(5, 2)], 3, 8, config) == []


def test_draws_and_flops_are_those_of_the_steps_one_by_one(config, tmp_path):
    """Three steps on two ranks, two on one: every pass of every rank added up."""
    write(tmp_path, [start(0, 2), start(3, 1)], global_batch=8)
    ledger = Ledger(tmp_path, config, 5)
    passes = [(sampler(config, 2).draw(step, rank), 4) for step in range(3) for rank in (0, 1)]
    passes += [(sampler(config, 1).draw(step, 0), 8) for step in (3, 4)]
    of = {subnet: cost.step_flops(config, subnet) for subnet, _ in passes}
    fixed = cost.step_flops(config, None)
    total = sum(images / BATCH * (fixed.teacher + fixed.intact + of[subnet].elastic) for subnet, images in passes)
    assert ledger.flops == pytest.approx(total)
    for subnet in ledger.grid.subnets[:-1]:
        account = ledger.of(subnet)
        own = [images for drawn, images in passes if drawn == subnet]
        assert (account.steps, account.images, account.draws, account.own_images) == (5, 40, len(own), sum(own))
        assert account.share == pytest.approx(sum(own) / BATCH * of[subnet].elastic / total if own else 0.0)
    largest = ledger.of(ledger.grid.largest)
    assert (largest.draws, largest.own_images) == (0, 40)
    assert sum(ledger.of(subnet).share for subnet in ledger.grid.subnets) == pytest.approx(1)


@pytest.mark.parametrize("family", ["vit", "eva", "swin", "resnet"])
def test_training_alone_costs_what_the_plan_says(family, experiment, tmp_path):
    """At the run's own FLOP/s; the plan's are a card's."""
    tree = experiment(family, optim={"epochs": 3, "steps_per_epoch": 2})
    config = parse_config(tree)
    write(tmp_path, [start(0, 2)], global_batch=2 * config.data.batch_size)
    ledger = Ledger(tmp_path, config, 6)
    subnet = ledger.grid.subnets[len(ledger.grid) // 2]
    depths = list(subnet.depths)
    tree["model"] |= {"width": {"min": subnet.width, "max": subnet.width, "step": config.model.width.step}}
    depth = depths[0] if config.model.one_stage else depths
    solo = parse_config(
        {**tree, "model": {**tree["model"], "depth": {"min": depth, "max": depth}}, "sampling": {"assignment": "none"}}
    )
    planned = speed(solo, 2, GPUS["h100"], 0.5)["gpu_hours"] * 3600 * GPUS["h100"].peak("fp32") * 0.5
    assert ledger.of(subnet).alone * ledger.flops == pytest.approx(planned)


def test_hours_are_those_between_lines_but_not_between_jobs(config, tmp_path):
    """Rank-seconds: 2 steps at the first line's 3 s by two ranks, 10 s more; then 1 step of 5 s by one and 7 s more."""
    line = [(2, 1767225606.0, 3.0), (4, 1767225616.0, 4.0), (5, 1767229205.0, 5.0), (6, 1767229212.0, 7.0)]
    lines = [{"step": step, "time": time, "step_seconds": seconds} for step, time, seconds in line]
    starts = [start(0, 2), start(4, 1, "2026-01-01T01:00:00Z")]
    write(tmp_path, starts, lines, global_batch=8)
    ledger = Ledger(tmp_path, config, 6)
    assert ledger.gpu_hours * 3600 == pytest.approx(2 * (2 * 3 + 10) + 5 + 7)
    assert ledger.of(ledger.grid.largest).own_hours == pytest.approx(
        ledger.gpu_hours * ledger.of(ledger.grid.largest).share
    )
    write(tmp_path, starts, global_batch=8)
    assert Ledger(tmp_path, config, 6).of(ledger.grid.largest).alone_hours is None


def test_a_card_says_what_it_took_and_what_was_not_measured(trained_run, tmp_path):
    card, largest = (
        (extract(trained_run, [name], tmp_path)[0].path / "README.md").read_text() for name in ("32x2", "64x4")
    )
    proof = json.loads((tmp_path / "32x2" / "proof.json").read_text())["account"]
    assert proof["steps"] == 8
    assert f"The run made 8 steps on 32 images. It was the elastic student of a rank {proof['draws']} times" in card
    assert "every image of every step trained it, as the intact student" in largest
    assert f"| this network alone on as many images and steps | {proof['alone_gpu_hours']:.3g} |" in card
    assert "Not measured: 20-NN accuracy (`poa eval knn`), linear probe" in card
    assert "DINO and iBOT losses with distillation between sizes, sinkhorn centering" in " ".join(card.split())
