"""Closed forms against a counter on the extracted timm models, and against the figures of the design."""

from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ExperimentConfig, HeadsConfig, ModelConfig
from pipeline.elastic import Grid, Subnet
from pipeline.elastic.cost import (
    feature_dim,
    flops,
    head_flops,
    head_params,
    masked_patches,
    params,
    step_flops,
)
from pipeline.elastic.head import ProjectionHeads
from pipeline.elastic.stochastic_depth import keep_indices


def counted(call, model=None) -> float:
    """FLOPs of `call`; the counter does not know fused attention on the CPU, so timm's multiplies it out in steps."""
    for module in model.modules() if model else ():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("place", [0, 1, -2, -1])
def test_params_and_flops_equal_a_counter_on_the_extracted_model(backbone, family, place, other_size):
    config, subnet = backbone.config, backbone.grid.subnets[place]
    export = backbone.export(subnet)
    assert params(config, subnet) == sum(tensor.numel() for tensor in export.state_dict.values())
    assert feature_dim(config, subnet) == export.feature_dim
    for size in (config.image_size, other_size[family]):
        args = export.model_args if family == "resnet" else {**export.model_args, "img_size": size}
        model = timm.create_model(export.architecture, **args).eval()
        with torch.no_grad():
            assert flops(config, subnet, size) == counted(partial(model, torch.zeros(1, 3, size, size)), model)


@pytest.mark.parametrize(
    ("family", "name", "million", "gmacs"),
    [
        ("vit", "small", 22.0, 4.6),
        ("vit", "base", 86.6, 17.6),
        ("vit", "large", 304.3, 61.6),
        ("swin", "tiny", 28.3, 4.5),
        ("resnet", "r50", 25.6, 4.1),
        ("resnet", "r101", 44.5, 7.8),
    ],
)
def test_paper_sizes_have_their_published_cost(family, name, million, gmacs):
    """Published figures include a classifier of 1000 classes; Swin has half its heads (of twice the size) there."""
    config = ModelConfig.model_validate({"family": family})
    subnet = Grid(config).parse(name)
    total = params(config, subnet) + 1000 * (feature_dim(config, subnet) + 1)
    assert total / 1e6 == pytest.approx(million, rel=0.01)
    assert flops(config, subnet) / 2e9 == pytest.approx(gmacs, rel=0.035)


def test_paper_run_has_the_flops_of_the_design():
    """Section 5: 81.55 TFLOP per step, shares of the branches, and the spread of the elastic branch."""
    config = ExperimentConfig()
    grid = Grid(config.model, config.sampling.small_bias)
    drawn = [subnet for subnet in grid.subnets[:-1] for _ in range(grid.multiplicity(subnet))]
    steps = [step_flops(config, subnet) for subnet in drawn]
    elastic = np.array([step.elastic for step in steps]) / 1e12
    total = np.mean([step.total for step in steps]) / 1e12
    assert total == pytest.approx(81.55, rel=1e-3)
    assert steps[0].teacher / 1e12 / total == pytest.approx(0.155, abs=5e-4)
    assert steps[0].intact / 1e12 / total == pytest.approx(0.642, abs=5e-4)
    assert elastic.mean() / total == pytest.approx(0.203, abs=5e-4)
    assert [elastic.min(), np.median(elastic), elastic.max()] == pytest.approx([4.9, 13.8, 50.2], abs=0.05)


@pytest.mark.parametrize("gain", ["unit", "learned"])
def test_head_cost_equals_a_counter(gain):
    config = HeadsConfig(prototypes=[8, 24], hidden_dim=20, bottleneck_dim=6, prototype_gain=gain)
    heads = ProjectionHeads(16, config)
    assert head_params(config, 16) == sum(p.numel() for p in heads.parameters())
    assert head_flops(config, 16) == counted(lambda: heads([torch.zeros(1, 16)]))


def test_masked_patches_are_the_mean_of_the_ratio():
    config = ExperimentConfig()
    assert masked_patches(config) == pytest.approx(0.5 * 0.3 * 196)


def test_step_flops_equal_a_counter_on_the_step(backbones):
    """ResNet, whose backward pass costs exactly twice the forward pass; masks as expected, half of the blocks kept."""
    model = backbones["resnet"]
    heads = {"prototypes": [32], "hidden_dim": 16, "bottleneck_dim": 8}
    config = ExperimentConfig.model_validate(
        {
            "model": {**model.config.model_dump(), "drop_path": 0.5},
            "heads": heads,
            "loss": {"mask_probability": 0.5, "mask_ratio": [0.25, 0.25]},
            "data": {
                "batch_size": 2,
                "global_crops": {"size": 64},
                "local_crops": {"size": 32, "count": 2},
            },
        }
    )
    projection = ProjectionHeads(2048, config.heads)
    crops = [torch.zeros(4, 3, 64, 64), torch.zeros(4, 3, 32, 32)]
    masked = 8  # half of the four global crops, a quarter of 16 patches
    assert masked_patches(config) * 4 == masked

    def teacher():
        features = model(crops[0], model.grid.largest)
        projection([features.cls, features.patches[:2, :4].flatten(0, 1)])

    def student(subnet):
        keep = keep_indices(0, 0, 0, 0, 0.5, [4, 4], model.num_draws, "cpu")
        glob, local = model.forward_crops(crops, subnet, keep=keep)
        parts = projection([glob.cls, local.cls, glob.patches[:2, :4].flatten(0, 1)])
        sum(logits.sum() for part in parts for logits in part).backward()

    model.requires_grad_(True)
    try:
        subnet = Subnet(96, (1, 2, 2, 1))
        expected = step_flops(config, subnet)
        with torch.no_grad():
            assert counted(teacher) == pytest.approx(expected.teacher, rel=1e-12)
        assert counted(lambda: student(model.grid.largest)) == pytest.approx(expected.intact, rel=1e-12)
        assert counted(lambda: student(subnet)) == pytest.approx(expected.elastic, rel=1e-12)
    finally:
        model.zero_grad()
        model.requires_grad_(False)
