"""The plan against brute force, against the real sampler, against a counter on the real modules, and the design."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cli import main
from pipeline.config import ExperimentConfig, load_config
from pipeline.elastic import build, cost
from pipeline.elastic.head import ProjectionHeads
from pipeline.elastic.stochastic_depth import keep_indices
from pipeline.engine.sizes import BUCKET
from pipeline.plan.forecast import communication, expected_slowest, sampler, stragglers
from pipeline.plan.memory import under
from pipeline.plan.plan import memory_estimate, plan

PRESETS = Path(__file__).parents[2] / "yaml"
VIT_L = PRESETS / "vit_large.yaml"
VIT_L_PARAMETERS = 303_350_784 + 58_737_664 + (8192 + 16384 + 32768 + 65536)  # backbone, heads, a gain per prototype


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_slowest_of_independent_ranks_equals_the_mean_over_all_draws(ranks):
    costs = [1.0, 1.0, 2.5, 4.0, 9.0]
    draws = [max(draw) for draw in itertools.product(costs, repeat=ranks)]
    assert expected_slowest(costs, ranks, "independent") == pytest.approx(sum(draws) / len(draws), rel=1e-12)


@pytest.mark.parametrize("assignment", ["balanced", "shared"])
@pytest.mark.parametrize("ranks", [1, 3, 8, 32])
def test_slowest_rank_equals_a_cycle_of_the_real_sampler(assignment, ranks):
    config = ExperimentConfig.model_validate({"model": {"family": "swin"}})
    law = sampler(config, ranks, assignment)
    price = {subnet: cost.step_flops(config, subnet).elastic for subnet in set(law.entries)}
    cycle = [max(price[law.draw(step, rank)] for rank in range(ranks)) for step in range(law.cycle_steps)]
    expected = sum(cycle) / len(cycle)
    assert expected_slowest([price[s] for s in law.entries], ranks, assignment) == pytest.approx(expected, rel=1e-9)


def test_groups_larger_than_the_law_wait_for_its_dearest_entry():
    assert expected_slowest([1.0, 2.0, 9.0], 6, "balanced") == 9.0
    assert expected_slowest([1.0, 2.0, 9.0], 5, "balanced") == 9.0
    assert expected_slowest([1.0, 2.0, 9.0], 2, "balanced") == pytest.approx((2 + 9 + 2) / 3)


def test_vit_run_has_the_figures_of_the_design():
    """Section 5: independent draws on 32 ranks cost 29.7%, balanced groups about nothing; 81.55 TFLOP per step."""
    config = load_config(VIT_L)
    waiting = stragglers(config, 32)
    assert waiting["independent"]["slowdown"] == pytest.approx(0.297, abs=5e-4)
    assert waiting["balanced"]["slowdown"] < 0.02
    assert waiting["shared"]["slowdown"] == 0
    found = plan(config, 32, "h200", 790 / 989.4)
    assert found["flops_per_step"]["total"] / 1e12 == pytest.approx(81.55, rel=1e-3)
    alone = found["flops_per_step"]["total"] / 790e12
    assert alone == pytest.approx(0.103, abs=5e-4)  # the design's step without waiting
    assert found["speed"]["step_seconds"] == pytest.approx(alone * (1 + waiting["balanced"]["slowdown"]))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["vit_large", "swin_base", "resnet152"])
def test_flops_of_the_papers_runs_equal_a_counter_on_the_real_modules(preset):
    """Teacher, intact and an elastic student of a whole step on the meta device, which computes shapes alone."""
    config = load_config(PRESETS / f"{preset}.yaml")
    images = config.data.batch_size
    with torch.device("meta"):
        backbone = build(config.model)
        heads = ProjectionHeads(backbone.feature_dim(backbone.grid.largest), config.heads)
        sides = (config.data.global_crops.size, config.data.local_crops.size)
        rows = (2 * images, config.data.local_crops.count * images)
        crops = [torch.empty(n, 3, side, side) for n, side in zip(rows, sides, strict=True)]
    masked = round(cost.masked_patches(config) * rows[0])

    def teacher():
        features = backbone.forward_crops(crops[:1], backbone.grid.largest)[0]
        heads([features.cls, features.patches.flatten(0, 1)[:masked]])

    def student(subnet):
        keep = keep_indices(0, 0, 0, 0, config.model.drop_path, rows, backbone.num_draws, "meta")
        glob, local = backbone.forward_crops(crops, subnet, keep=keep)
        parts = heads([local.cls, glob.cls, glob.patches.flatten(0, 1)[:masked]])
        sum(logits.sum() for part in parts for logits in part).backward()

    def counted(call, *args) -> float:
        with FlopCounterMode(display=False) as counter:
            call(*args)
        return counter.get_total_flops()

    subnet = backbone.grid.subnets[len(backbone.grid) // 3]
    planned = cost.step_flops(config, subnet)
    with torch.no_grad():
        assert counted(teacher) == pytest.approx(planned.teacher, rel=0.01)
    assert counted(student, backbone.grid.largest) == pytest.approx(planned.intact, rel=0.01)
    assert counted(student, subnet) == pytest.approx(planned.elastic, rel=0.01)


def test_traffic_counts_what_a_ring_sends():
    config = load_config(VIT_L, ["engine.precision=fp32"])
    weights = 4 * VIT_L_PARAMETERS
    two, many = communication(config, 2, 1), communication(config, 1000, 1)
    assert two["gradients"] == weights / 2  # (R-1)/R
    assert communication(config, 2, 0)["gradients"] == communication(config, 2, 2)["gradients"] == weights
    halved = load_config(VIT_L, ["engine.precision=fp32", "engine.reduce_dtype=bf16"])
    assert communication(halved, 2, 1)["gradients"] == weights / 4
    assert two["student weights"] == two["teacher weights"] == weights / 2
    assert many["gradients"] == pytest.approx(weights, rel=2e-3)
    assert communication(config, 2, 0)["student weights"] == 0  # replicas update themselves
    assert sum(communication(config, 1, 1).values()) == 0


def test_fsdp2_sends_once_or_for_every_pass_and_the_rest_between_replicas():
    fsdp2 = ["engine.precision=fp32", "engine.backend=fsdp2"]
    weights = 4 * VIT_L_PARAMETERS
    config = load_config(VIT_L, [*fsdp2, "engine.shard_size=node"])
    keep, reshard = (under(config, reshard_after_forward=reshard) for reshard in (False, True))
    share = 7 / 8  # of 8 ranks of a node, 4 nodes
    assert communication(keep, 32)["gradients"] == communication(keep, 32)["student weights"] == share * weights
    assert communication(reshard, 32)["gradients"] == 2 * share * weights
    assert communication(reshard, 32)["student weights"] == 4 * share * weights
    for each in (keep, reshard):
        assert communication(each, 32)["teacher weights"] == share * weights
        assert communication(each, 32)["gradients between replicas"] == 2 * (3 / 4) * weights / 8
    one = communication(load_config(VIT_L, [*fsdp2, "engine.shard_size=one"]), 32)
    assert one["gradients between replicas"] == 2 * (31 / 32) * weights
    assert one["gradients"] == one["student weights"] == 0


def test_fsdp2_holds_masters_and_average_alone_and_one_copy_more_of_weights_that_stay_gathered():
    config = load_config(VIT_L, ["engine.backend=fsdp2"])
    keep, reshard = (memory_estimate(under(config, reshard_after_forward=each), 4) for each in (False, True))
    assert keep["fp32 master, AdamW, EMA"] == reshard["fp32 master, AdamW, EMA"] == 4 * VIT_L_PARAMETERS
    assert keep["weights (student, teacher)"] == 0
    assert keep["gathered weights (estimate)"] - reshard["gathered weights (estimate)"] > 1.5 * VIT_L_PARAMETERS
    assert keep["gradients"] > 4 * VIT_L_PARAMETERS > 2 * reshard["gradients"]


def test_sharding_divides_what_the_optimizer_holds():
    config = load_config(VIT_L, ["engine.precision=fp32"])
    key = "fp32 master, AdamW, EMA"
    whole, half = (memory_estimate(config, ranks, 1)[key] for ranks in (1, 2))
    assert whole == 2 * half == 16 * VIT_L_PARAMETERS


def test_the_host_holds_the_snapshot_of_a_checkpoint_and_what_is_offloaded(capsys):
    vectors = 16 * VIT_L_PARAMETERS  # four, of fp32
    assert plan(load_config(VIT_L), 4, "h100", 0.5)["host_memory"] == {
        "offloaded state": 0,
        "snapshot of a checkpoint": vectors / 4,
    }
    assert main(["plan", str(VIT_L), "engine.offload_optimizer=cpu", "--gpus", "4", "--gpu", "h100"]) == 0
    text = capsys.readouterr().out
    assert "in the host's memory per GPU: offloaded state 1.35, snapshot of a checkpoint 1.35\n" in text


def test_implementations_are_said_as_they_resolve(capsys):
    assert main(["plan", str(VIT_L), "engine.kernels.attention=sdpa", "--gpus", "1", "--gpu", "h100"]) == 0
    words = "attention eager, residual triton, loss triton, sinkhorn triton, colours triton, optimizer triton"
    assert f"kernels      {words}\n" in capsys.readouterr().out
    assert main(["train", str(VIT_L), "engine.kernels.attention=sdpa", "--dry-run"]) == 0
    assert f"kernels: {words}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("precision", "reduced", "stage", "each", "bucket"),
    [
        ("fp32", "fp32", 1, 4 + 4 / 4, 4),  # both passes add up where autograd leaves them; a rank's share; a bucket
        ("bf16", "bf16", 1, 2 + 2 / 4, 2),
        ("bf16", "fp32", 1, 2 + 4, 0),  # the first pass, and what it is widened to
        ("bf16", "fp32", 2, 2 * 4 / 4, 2 * 4 + 2 + 4),  # shares of both passes; two buckets under way and the next
        ("fp32", "bf16", 0, 4 + 2, 4),
    ],
)
def test_gradients_take_the_bytes_of_passes_shares_and_buckets(precision, reduced, stage, each, bucket):
    config = load_config(VIT_L, [f"engine.precision={precision}", f"engine.reduce_dtype={reduced}"])
    assert memory_estimate(config, 4, stage)["gradients"] == each * VIT_L_PARAMETERS + bucket * BUCKET


def test_fp32_is_planned_without_the_matrix_units(capsys):
    found = plan(load_config(VIT_L, ["engine.precision=fp32"]), 1, "a100", 0.5)
    assert found["speed"]["step_seconds"] == pytest.approx(found["flops_per_step"]["total"] / (0.5 * 19.5e12))
    assert main(["plan", str(VIT_L), "engine.precision=fp32", "--gpus", "32", "--gpu", "a100"]) == 0
    assert "of the peak, 20 TFLOP/s (TF32 is never switched on)" in capsys.readouterr().out


def test_command_prints_a_table_and_json(capsys):
    assert main(["plan", str(VIT_L), "--gpus", "256", "--gpu", "h200"]) == 0
    text = capsys.readouterr().out
    assert "256 x h200" in text
    assert "GPU-hours" in text
    assert main(["plan", str(VIT_L), "data.batch_size=10", "--gpus", "4096", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["global_batch"] == 40960
    assert found["speed"]["gpu_hours"] == pytest.approx(found["speed"]["days"] * 24 * 4096)
    assert found["data"]["samples"] is None  # there are no such shards


def test_command_knows_the_samples_of_shards_at_hand(capsys, digits):
    assert main(["plan", str(VIT_L), f"data.train={digits}/train-{{000000..000002}}.tar", "--gpus", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["data"]
    assert (found["shards"], found["samples"]) == (3, 1438)
    assert found["passes_per_epoch"] == pytest.approx(50 * 800 / 1438)


@pytest.mark.parametrize("arguments", [["--gpus", "0"], ["--gpus", "8", "--mfu", "1.5"]])
def test_impossible_questions_are_refused(arguments, capsys):
    assert main(["plan", str(VIT_L), *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_network_alone_costs_a_teacher_and_one_student():
    """The largest of the grid, as if it were the whole grid; what the elastic student would add is left out."""
    alone, elastic = (load_config(VIT_L, [f"sampling.assignment={name}"]) for name in ("none", "shared"))
    found, whole = plan(alone, 8, "h200", 0.5), plan(elastic, 8, "h200", 0.5)
    flops, of_whole = found["flops_per_step"], whole["flops_per_step"]
    assert flops["elastic_mean"] == 0
    assert flops["total"] == of_whole["teacher"] + of_whole["intact"]
    assert found["speed"]["step_seconds"] == pytest.approx(flops["total"] / (0.5 * found["peak_flops"]))
    assert found["parameters"]["smallest_subnet"] == found["parameters"]["backbone"] == whole["parameters"]["backbone"]
    for stage, times in (("0", 1), ("1", 1), ("2", 2), ("3", 2)):
        sent, of_two = found["communication"][stage]["gradients"], whole["communication"][stage]["gradients"]
        assert of_two == pytest.approx(times * sent)
    assert whole["communication"]["3"]["student weights"] == 2 * found["communication"]["3"]["student weights"]
