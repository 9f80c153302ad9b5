import subprocess
import sys
from itertools import combinations, pairwise

import pytest

from pipeline.config import ModelConfig
from pipeline.elastic import Grid, Subnet, cost
from pipeline.elastic.subnet import kept, kept_blocks, kept_blocks_by_parity, most_important
from pipeline.errors import UserError


def paper_grid(family: str, small_bias: float = 1) -> Grid:
    return Grid(ModelConfig.model_validate({"family": family}), small_bias)


@pytest.mark.parametrize(("family", "count"), [("vit", 143), ("eva", 143), ("swin", 39), ("resnet", 465)])
def test_paper_grids_have_the_published_number_of_subnets(family, count):
    grid = paper_grid(family)
    assert len(set(grid.subnets)) == len(grid) == count
    assert grid.subnets[0] == grid.smallest
    assert grid.subnets[-1] == grid.largest


@pytest.mark.parametrize(("family", "small_bias", "entries"), [("vit", 3, 573), ("swin", 2, 89), ("resnet", 2, 699)])
def test_multiplicities_sum_to_the_published_number_of_entries(family, small_bias, entries):
    grid = paper_grid(family, small_bias)
    assert sum(map(grid.multiplicity, grid.subnets)) == entries
    assert grid.multiplicity(grid.largest) == 1


def test_multiplicities_are_products_of_two_falling_lines_rounded_to_even():
    grid = paper_grid("vit", 3)
    assert grid.multiplicity(Subnet(384, (12,))) == 9  # 3 * 3
    assert grid.multiplicity(Subnet(1024, (12,))) == 3  # 1 * 3
    assert grid.multiplicity(Subnet(704, (18,))) == 4  # 2 * 2
    assert grid.multiplicity(Subnet(384, (21,))) == 4  # 3 * 1.5 = 4.5
    assert grid.multiplicity(Subnet(1024, (21,))) == 2  # 1 * 1.5


def test_resnet_multiplicities_ignore_the_width():
    grid = paper_grid("resnet", 2)
    for depths in ((3, 4, 6, 3), (3, 8, 36, 3)):
        assert len({grid.multiplicity(Subnet(width, depths)) for width in (64, 96, 128)}) == 1
    assert grid.multiplicity(Subnet(128, (3, 4, 6, 3))) == 2


def test_names_are_read_back():
    for family in ("vit", "eva", "swin", "resnet"):
        grid = paper_grid(family)
        assert [grid.parse(subnet.name) for subnet in grid.subnets] == list(grid.subnets)
    assert Subnet(96, (2, 2, 6, 2)).name == "96x2.2.6.2"


def test_mlp_ratios_multiply_the_grid_and_only_narrow_ones_are_named(tiny_config):
    config = ModelConfig.model_validate({"mlp_ratio": {"min": 2}, "width": {"min": 896}, "depth": {"min": 23}})
    grid = Grid(config, 3)
    assert [subnet.name for subnet in grid.subnets[:4]] == ["896x23m2", "896x23m3", "896x23", "896x24m2"]
    assert len(grid) == 3 * 2 * 3  # widths, depths, ratios
    # 3 * 3, 2 * 3, 1 * 3 of the shallow ones and 3, 2, 1 of the deep ones, for each ratio
    assert sum(map(grid.multiplicity, grid.subnets)) == 3 * (9 + 6 + 3 + 3 + 2 + 1)
    assert grid.largest == Subnet(1024, (24,)) == grid.parse("1024x24m4") == grid.parse("large")
    assert sorted(grid.subnets, reverse=True)[0] == grid.largest
    assert [grid.parse(subnet.name) for subnet in grid.subnets] == list(grid.subnets)
    with pytest.raises(UserError, match=r"no sub-network '896x23m1'.*nearest in the grid: 896x23m2, "):
        grid.parse("896x23m1")
    wide = ModelConfig.model_validate({"mlp_ratio": {"min": 2, "max": 6, "step": 2}})
    assert Grid(wide).parse("large") == Subnet(1024, (24,), 4)


def test_a_sub_network_may_have_narrower_mlps_by_hand():
    config = ModelConfig.model_validate({"mlp_ratio": {"min": 2}})
    thin, usual = (cost.params(config, Subnet(384, (12,), ratio)) for ratio in (2, None))
    assert usual - thin == 12 * (2 * 384 * 2 * 384 + 2 * 384)  # two columns' worth of both layers, and of the biases


def test_aliases_are_the_sizes_of_the_paper():
    assert paper_grid("vit").aliases == {
        "small": Subnet(384, (12,)),
        "base": Subnet(768, (12,)),
        "large": Subnet(1024, (24,)),
    }
    assert paper_grid("swin").parse("base") == Subnet(128, (2, 2, 18, 2))
    assert set(paper_grid("resnet").aliases) == {"r101", "r152"} | {"r50"}


def test_aliases_outside_a_grid_are_unknown(tiny_config):
    with pytest.raises(UserError, match="no sub-network 'base'"):
        Grid(tiny_config("vit")).parse("base")


@pytest.mark.parametrize(
    ("name", "nearest"), [("400x12", "384x12"), ("384x11", "384x12"), ("smal", "small"), ("1024x25", "1024x24")]
)
def test_an_impossible_name_is_answered_with_the_nearest_ones(name, nearest):
    with pytest.raises(UserError, match=nearest) as error:
        paper_grid("vit").parse(name)
    assert error.value.fix.split(": ")[1].split(", ")[0] == nearest


@pytest.mark.parametrize("name", ["384x12.2", "384", "x", "", "384x12x1", "-384x12", "３８４x12", f"{'9' * 5000}x1"])
def test_malformed_names_are_user_errors(name):
    with pytest.raises(UserError):
        paper_grid("vit").parse(name)


def test_kept_blocks_are_spread_from_first_to_last():
    assert kept_blocks(12, 24) == (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23)
    assert kept_blocks(24, 24) == tuple(range(24))
    assert kept_blocks(1, 5) == (0,)


def test_kept_swin_blocks_have_the_parity_of_their_new_index():
    assert kept_blocks_by_parity(6, 18) == (0, 3, 6, 11, 14, 17)
    for full in range(1, 25):
        for depth in range(1, full + 1):
            kept = kept_blocks_by_parity(depth, full)
            assert len(kept) == depth
            assert all(a < b for a, b in pairwise(kept))
            assert all(block % 2 == j % 2 for j, block in enumerate(kept))
            assert kept[-1] < full


def test_kept_swin_blocks_are_as_even_as_parity_allows():
    """No other choice lies nearer to the even spread, at any place: each index is the nearest one of its parity."""
    for depth in range(2, 19):
        kept = kept_blocks_by_parity(depth, 18)
        for j, block in enumerate(kept):
            ideal = j * 17 / (depth - 1)
            choices = [i for i in range(18) if i % 2 == j % 2]
            assert abs(block - ideal) == pytest.approx(min(abs(i - ideal) for i in choices))


def test_measured_importance_chooses_the_blocks_of_a_depth():
    scores = (3.0, 1.0, 2.0, 1.0, 5.0)
    assert [most_important(depth, scores) for depth in (1, 2, 3, 5)] == [(4,), (0, 4), (0, 2, 4), (0, 1, 2, 3, 4)]
    assert most_important(3, scores, by_parity=True) == (0, 1, 4)  # of 0 1 2 (6), 0 1 4 (9), 0 3 4 (9), 2 3 4 (8)
    for depth in range(1, 7):
        many = (0.3, 2.0, 0.1, 1.7, 0.9, 0.4)
        allowed = [c for c in combinations(range(6), depth) if all(b % 2 == j % 2 for j, b in enumerate(c))]
        best = max(sum(many[b] for b in c) for c in allowed)
        assert sum(many[b] for b in most_important(depth, many, by_parity=True)) == pytest.approx(best)


def test_importance_is_a_value_of_the_config_and_is_of_its_blocks(tiny_config):
    config = tiny_config("vit", block_importance=[[0.1, 0.9, 0.2, 0.8, 0.3]])
    assert kept(config, Subnet(16, (2,))) == ((1, 3),)
    assert kept(tiny_config("vit"), Subnet(16, (2,))) == ((0, 4),)
    with pytest.raises(ValueError, match=r"block_importance is of \[3\] blocks and the stages have \[5\]"):
        tiny_config("vit", block_importance=[[0.1, 0.9, 0.2]])


def test_grids_and_costs_need_no_torch():
    code = "import sys, pipeline.elastic.sampling, pipeline.elastic.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
