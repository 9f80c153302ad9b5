"""Swin's geometry against timm's blocks built for the same map."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock

from pipeline.elastic import build
from pipeline.elastic.windows import from_windows, to_windows, windows

CPU = torch.device("cpu")


@pytest.mark.parametrize("sides", [(8, 8), (9, 9), (4, 4), (3, 3), (4, 8), (8, 4), (3, 10), (12, 5), (2, 2)])
def test_windows_shift_and_mask_are_those_of_timm(sides):
    block = SwinTransformerBlock(8, sides, num_heads=1, window_size=4, shift_size=2)
    geometry = windows(*sides, 4, 4, CPU)
    assert geometry.size == block.window_size
    assert geometry.shift == block.shift_size
    if block.attn_mask is None:
        assert geometry.mask is None
    else:
        assert torch.equal(geometry.mask, block.attn_mask)
    assert torch.equal(geometry.rows, block.attn.relative_position_index.flatten())


def test_a_map_of_one_window_is_not_shifted():
    assert windows(7, 7, 7, 7, CPU).shift == (0, 0)
    assert windows(7, 7, 7, 7, CPU).mask is None
    assert windows(14, 7, 7, 7, CPU).shift == (3, 0)


@pytest.mark.parametrize("sides", [(4, 4), (3, 3), (1, 1), (3, 4)])
def test_bias_tables_are_resized_as_timm_does(sides):
    block = SwinTransformerBlock(8, (16, 16), num_heads=2, window_size=5)
    table = block.attn.relative_position_bias_table.detach().clone()
    block.attn.set_window_size(sides)
    resize = windows(*sides, 5, 5, CPU).resize
    torch.testing.assert_close(resize @ table, block.attn.relative_position_bias_table.detach())


@pytest.mark.parametrize("sides", [(8, 8), (9, 7), (3, 3)])
@pytest.mark.parametrize("shifted", [False, True])
def test_window_order_is_undone(sides, shifted):
    geometry = windows(*sides, 4, 4, CPU)
    x = torch.arange(2.0 * sides[0] * sides[1] * 3).view(2, *sides, 3)
    tokens = to_windows(x, geometry, shifted)
    assert tokens.shape[0] % (geometry.size[0] * geometry.size[1]) == 0
    assert torch.equal(from_windows(tokens, *sides, geometry, shifted), x)


def test_kept_blocks_alternate_their_shift(tiny_config):
    """As trained in place and as timm builds the extracted model: even blocks plain, odd ones shifted."""
    model = build(tiny_config("swin"))
    seen = []
    for block in model.layers[2].blocks:
        block.register_forward_pre_hook(lambda module, _: seen.append(module.shifted))
    for depth in range(2, 6):
        seen.clear()
        model(torch.zeros(1, 3, 96, 96), model.grid.parse(f"16x2.2.{depth}.2"))
        assert seen == [j % 2 == 1 for j in range(depth)]
