"""The shipped experiment files, and the paper's runs among them, against numbers worked out by hand."""

import math
from pathlib import Path

import pytest
import timm

from pipeline.config import load_config
from pipeline.elastic import Grid
from pipeline.method.schedules import Schedules

YAML = Path(__file__).parents[2] / "yaml"
PRESETS = sorted(path.relative_to(YAML).as_posix() for path in [*YAML.glob("*.yaml"), *YAML.glob("recipes/*.yaml")])
GRIDS = {  # sub-networks, entries of the sampling law; small grids counted by hand
    "vit_large.yaml": (143, 573),
    "swin_base.yaml": (39, 89),
    "resnet152.yaml": (465, 699),
    "vit_base_8gpu.yaml": (7 * 5, 140),
    "swin_tiny_8gpu.yaml": (2 * 5, 23),
    "resnet50_8gpu.yaml": (2 * 2 * 3 * 4 * 2, 144),
    "adapt_dinov2_base_8gpu.yaml": (7 * 5 * 3, 3 * 79),
}
PAPER_RUNS = {  # ranks, global batch, steps, peak and last learning rate, last momentum and weight decay
    "vit_large.yaml": (32, 1600, 276_800, 5.0e-3, 6.2e-4, 0.99899, 0.3587),
    "swin_base.yaml": (32, 2048, 216_250, 5.66e-3, 1.82e-4, 0.99971, 0.3912),
    "resnet152.yaml": (32, 1280, 692_000, 4.47e-3, 2.0e-5, 0.9999, 0.4),
}


def preset(name):
    return load_config(YAML / name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_says_how_to_run_it(name):
    config = preset(name)
    assert len(Grid(config.model, config.sampling.small_bias)) > 1
    header = (YAML / name).read_text().split("\nmodel:")[0]
    assert all(line.startswith("#") for line in header.splitlines() if line)
    assert all(word in header for word in ("Hardware", "Time", "Expect", "poa " if "demo" in name else f"yaml/{name}"))


@pytest.mark.parametrize("name", GRIDS)
def test_grid_and_multiplicities(name):
    config = preset(name)
    grid = Grid(config.model, config.sampling.small_bias)
    assert (len(grid), sum(map(grid.multiplicity, grid.subnets))) == GRIDS[name]


@pytest.mark.parametrize("name", ["adapt_dinov2_base_8gpu.yaml", "adapt_dinov3_large_8gpu.yaml"])
def test_adaptation_begins_with_weights_that_timm_knows_and_with_the_heads(name):
    config = preset(name)
    assert timm.models.is_model_pretrained(config.model.init_from)
    schedules = Schedules(config.optim, config.loss, 512)
    epoch = config.optim.steps_per_epoch
    assert [schedules.at(step).backbone_frozen for step in (0, epoch - 1, epoch)] == [True, True, False]
    assert schedules.at(25_000 - 1).lr < 2e-6


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_the_runs_of_the_paper_end_where_its_schedules_are_cut(name):
    ranks, batch, steps, peak, last_lr, last_momentum, last_decay = PAPER_RUNS[name]
    config = preset(name)
    assert config.data.batch_size * ranks == batch
    assert config.optim.total_steps == steps
    schedules = Schedules(config.optim, config.loss, batch)
    first_epochs = config.optim.warmup_epochs * config.optim.steps_per_epoch
    assert schedules.at(first_epochs - 1).lr == pytest.approx(peak, rel=2e-3)
    last = schedules.at(steps - 1)
    assert last.lr == pytest.approx(last_lr, rel=5e-3)
    assert last.momentum == pytest.approx(last_momentum, abs=1e-5)
    assert last.weight_decay == pytest.approx(last_decay, abs=1e-4)
    assert (last.teacher_temp, last.ibot) == (0.07, True)


def test_what_sets_the_three_runs_apart():
    runs = {name.split(".")[0].split("_")[0]: preset(name) for name in PAPER_RUNS}
    assert {name: c.sampling.small_bias for name, c in runs.items()} == {"vit": 3, "swin": 2, "resnet152": 2}
    assert {name: c.optim.layer_decay for name, c in runs.items()} == {"vit": 0.9, "swin": 0.9, "resnet152": 0.95}
    assert {n: c.optim.patch_embed_lr_scale for n, c in runs.items()} == {"vit": 0.2, "swin": 0.2, "resnet152": 1.0}
    assert {name: c.loss.mask_ratio[1] for name, c in runs.items()} == {"vit": 0.5, "swin": 0.3, "resnet152": 0.3}
    assert {name: c.optim.warmup_epochs for name, c in runs.items()} == {"vit": 10, "swin": 30, "resnet152": 30}
    for config in runs.values():
        assert config.loss.ibot_start_epoch == 30
        assert config.loss.mask_ratio[0] == 0.1
        assert config.data.blur == (0.0, 0.9, 0.5)
        assert (config.data.local_crops.count, config.data.local_crops.size) == (8, 96)


@pytest.mark.parametrize(
    ("name", "small", "base", "large"),
    [
        ("vit_large.yaml", "384x12", "768x12", "1024x24"),
        ("swin_base.yaml", "96x2.2.6.2", "96x2.2.18.2", "128x2.2.18.2"),
        ("resnet152.yaml", "64x3.4.6.3", "64x3.4.23.3", "64x3.8.36.3"),
    ],
)
def test_the_sizes_that_the_paper_names_are_in_the_grids(name, small, base, large):
    grid = Grid(preset(name).model)
    assert [subnet.name for subnet in grid.aliases.values()] == [small, base, large]


def test_masks_fill_the_grid_of_the_last_map_spread_two_by_two():
    from pipeline.elastic.cost import masked_patches

    assert masked_patches(preset("vit_large.yaml")) == pytest.approx(0.5 * 0.3 * 14 * 14)
    for name in ("swin_base.yaml", "resnet152.yaml"):
        assert math.isclose(masked_patches(preset(name)), 0.5 * 0.2 * 14 * 14)
