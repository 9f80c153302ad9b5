"""Bands of cost."""

from collections import Counter

import pytest

from pipeline.config import ModelConfig
from pipeline.elastic import Grid, cost
from pipeline.elastic.sampling import SubnetSampler
from pipeline.measure.bands import Bands
from pipeline.measure.metrics import BANDS


@pytest.mark.parametrize("family", ["vit", "eva", "swin", "resnet"])
def test_bands_hold_about_a_quarter_of_the_draws_each_and_rise_in_cost(family):
    model = ModelConfig.model_validate({"family": family})
    grid = Grid(model, 3)
    bands = Bands(model, grid)
    sampler = SubnetSampler(grid, lambda subnet: cost.flops(model, subnet), 1, "independent", 0)
    entries = sum(grid.multiplicity(s) for s in grid.subnets if s != grid.largest)
    drawn = Counter(bands.index(sampler.draw(step, 0)) for step in range(entries))
    assert all(abs(drawn[i] / entries - 1 / len(BANDS)) < 0.05 for i in range(len(BANDS)))
    assert bands.gflops == sorted(bands.gflops)
    assert bands.index(grid.largest) == len(BANDS) - 1
    for subnet in grid.subnets[:-1]:
        assert cost.flops(model, subnet) / 1e9 <= bands.gflops[bands.index(subnet)] * (1 + 1e-9)
