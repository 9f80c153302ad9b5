"""Footprints counted by hand, and those of a whole grid against networks counted one by one."""

import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.elastic import build
from pipeline.select.footprint import Footprints, footprint


def test_operations_traffic_and_peak_of_two_layers_by_hand():
    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.ReLU(), nn.Linear(10, 4))

    found = footprint(make, (3, 8, 8), batch=5)
    assert found.operations == 3  # flattening makes a view
    assert found.traffic == 5 * 4 * (10 + 10 + 4)
    assert found.activations == 5 * 4 * (192 + 10 + 10)  # image, first product, what ReLU makes of it
    assert footprint(make, (3, 8, 8), 5, "bf16").activations == found.activations / 2


def test_what_is_computed_in_place_takes_no_memory():
    found = footprint(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)), (6,), batch=1)
    assert (found.operations, found.activations) == (1, 4 * (6 + 6))


@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_a_grid_from_few_passes_equals_every_network_counted_alone(experiment, family):
    model = experiment(family)["model"] | ({"mlp_ratio": {"min": 2, "max": 4, "step": 2}} if family == "vit" else {})
    with torch.device("meta"):
        backbone = build(ModelConfig.model_validate(model))
    footprints = Footprints(backbone, batch=2)
    widest = [subnet for subnet in backbone.grid.subnets if subnet.width == backbone.grid.widths[-1]]
    for subnet in widest:
        alone = footprints._count(subnet)
        assert footprints(subnet).activations == alone.activations
        assert footprints(subnet).operations == pytest.approx(alone.operations, rel=0.02)
        assert footprints(subnet).traffic == pytest.approx(alone.traffic, rel=0.02)
