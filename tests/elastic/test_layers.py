"""Slicing rules against hand-written index lists."""

import pytest
import torch
from timm.layers import PatchEmbed
from torch import nn

from pipeline.elastic.layers import (
    ELASTIC,
    ElasticConv2d,
    ElasticGroupNorm,
    ElasticLayerNorm,
    ElasticLinear,
    ElasticMergedNorm,
    ElasticMlp,
    ElasticPatchEmbed,
    ElasticQKV,
    ElasticReduction,
    leading,
    make_elastic,
)


def double(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    module = module.double()
    for p in module.parameters():
        nn.init.normal_(p)
    return module


def test_linear_cuts_both_sides_and_scales_by_the_missing_inputs():
    layer = double(ElasticLinear(6, 4))
    x = torch.randn(5, 3, dtype=torch.double)
    expected = x @ layer.weight[:2, :3].T * 2 + layer.bias[:2]
    torch.testing.assert_close(layer(x, 2), expected)


def test_full_layers_use_their_parameters_as_they_are():
    layer = ElasticLinear(6, 4)
    cut = layer.sliced(4, 6)
    assert cut["weight"] is layer.weight
    assert cut["bias"] is layer.bias


def test_outputs_alone_are_cut_without_a_factor():
    layer = double(ElasticLinear(6, 4))
    torch.testing.assert_close(layer.sliced(2, 6)["weight"], layer.weight[:2])


def test_queries_keys_and_values_are_cut_alike():
    layer = double(ElasticQKV(4, 12))
    rows = [0, 1, 4, 5, 8, 9]
    cut = layer.sliced(6, 2)
    torch.testing.assert_close(cut["weight"], layer.weight[rows][:, :2] * 2)
    torch.testing.assert_close(cut["bias"], layer.bias[rows])


def test_patch_merging_cuts_the_channels_of_each_of_four_neighbours():
    layer, norm = double(ElasticReduction(12, 6, bias=False)), double(ElasticMergedNorm(12))
    columns = [0, 1, 3, 4, 6, 7, 9, 10]
    torch.testing.assert_close(layer.sliced(4, 8)["weight"], layer.weight[:4, columns] * 12 / 8)
    torch.testing.assert_close(norm.sliced(8)["weight"], norm.weight[columns])


def test_convolution_scales_where_its_input_is_cut():
    layer = double(ElasticConv2d(6, 4, 3, stride=2, padding=1))
    x = torch.randn(2, 2, 5, 5, dtype=torch.double)
    expected = nn.functional.conv2d(x, layer.weight[:3, :2] * 3, layer.bias[:3], stride=2, padding=1)
    torch.testing.assert_close(layer(x, 3), expected)


@pytest.mark.parametrize("width", [4, 6])
def test_patches_by_a_matrix_product_are_those_of_the_convolution(width):
    """As on a GPU: rows and columns of patches, channels and pixels in the order of the weight; gradients too."""
    embed = double(PatchEmbed(None, (2, 3), 5, 6, flatten=False))
    make_elastic(embed, ELASTIC)
    assert isinstance(embed, ElasticPatchEmbed)
    images = torch.randn(2, 5, 8, 9, dtype=torch.double)
    results = [way(images, width) for way in (embed.convolution, embed.product)]
    above = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(result, list(embed.proj.parameters()), above) for result in results]
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_layer_norm_runs_over_the_active_channels():
    layer = double(ElasticLayerNorm(6, eps=1e-6))
    x = torch.randn(5, 4, dtype=torch.double)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight[:4] + layer.bias[:4]
    torch.testing.assert_close(layer(x), expected)


def test_group_norm_spreads_its_groups_over_the_active_channels():
    layer = double(ElasticGroupNorm(2, 8))
    x = torch.randn(3, 4, 5, 5, dtype=torch.double)
    groups = x.view(3, 2, 2, 5, 5)
    centred = groups - groups.mean((2, 3, 4), keepdim=True)
    normal = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + layer.eps).sqrt()).view_as(x)
    expected = normal * layer.weight[:4, None, None] + layer.bias[:4, None, None]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("ratio", [4, 3])
def test_hidden_units_of_an_mlp_are_a_multiple_of_the_channels(ratio):
    from timm.layers import Mlp

    mlp = double(Mlp(8, 32))
    make_elastic(mlp, {Mlp: ElasticMlp, nn.Linear: ElasticLinear})
    x = torch.randn(5, 2, dtype=torch.double)
    units = 2 * ratio
    hidden = nn.functional.gelu(x @ mlp.fc1.weight[:units, :2].T * 4 + mlp.fc1.bias[:units])
    torch.testing.assert_close(mlp(x, ratio), hidden @ mlp.fc2.weight[:2, :units].T * (32 / units) + mlp.fc2.bias[:2])


def test_pre_activations_keep_their_scale():
    """With the factor I / i, halving the inputs leaves the expected size of a pre-activation of equal inputs alone."""
    layer = ElasticLinear(64, 4, bias=False)
    nn.init.ones_(layer.weight)
    for width in (16, 32, 64):
        torch.testing.assert_close(layer(torch.ones(1, width)), torch.full((1, 4), 64.0))


@pytest.mark.parametrize(("groups", "expected"), [(1, [0, 1, 2, 3]), (2, [0, 1, 4, 5]), (4, [0, 2, 4, 6])])
def test_leading_takes_the_first_part_of_each_group(groups, expected):
    assert leading(torch.arange(8), 4, groups=groups).tolist() == expected


def test_making_a_layer_elastic_keeps_its_parameters():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4)))
    before = dict(model.named_parameters())
    make_elastic(model, {nn.Linear: ElasticLinear})
    assert isinstance(model[1][0], ElasticLinear)
    assert all(p is before[name] for name, p in model.named_parameters())
