"""Units that change places leave the full network what it is, whatever the family, and reach every cut parameter."""

import copy

import pytest
import torch

from pipeline.elastic.axes import Place, axes, magnitudes, permute, written_by_blocks


def shuffled(backbone, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {axis.name: torch.randperm(axis.units, generator=generator).tolist() for axis in axes(backbone)}


def features(backbone, subnet=None):
    size, dtype = backbone.config.image_size, backbone.mask_token.dtype
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows, columns = backbone.patch_grid(size)
    masks = torch.zeros(2, rows * columns, dtype=torch.bool)
    masks[:, ::3] = True
    with torch.inference_mode():
        return backbone(images, subnet, masks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_full_network_computes_the_same_features_in_another_order(backbone, family, dtype):
    """To 1e-12 in fp64; to 1e-6 in fp32, or to twice what fp32 loses of the network as it was (a ResNet at random)."""
    exact, model = features(copy.deepcopy(backbone).double()), copy.deepcopy(backbone).to(dtype)
    orders = shuffled(model)
    before, narrow = features(model), features(model, model.grid.smallest)
    permute(model, orders)
    after = features(model)
    last = {"vit": "channels", "eva": "channels", "swin": "layers.3.channels"}.get(family)
    order = torch.tensor(orders[last]) if last else slice(None)
    for true, old, new in zip(exact, before, after, strict=True):
        lost, loses = ((x.double() - y).norm() / y.norm() for x, y in ((old, true), (new, true[..., order])))
        assert loses < (1e-12 if dtype == torch.float64 else max(1e-6, 2 * lost))
    assert not torch.allclose(features(model, model.grid.smallest).cls, narrow.cls, rtol=1e-2)


def test_every_parameter_that_is_cut_is_moved(backbone):
    """Whatever a sub-network has less of than the full network lies along an axis."""
    narrow = backbone.grid.subnets[0]
    cut = {
        name
        for name, tensor in backbone.export(narrow).state_dict.items()
        if tensor.shape != backbone.state_dict()[backbone.source_name(name, narrow)].shape
    }
    held = {place.name for axis in axes(backbone) for place in axis.places}
    assert {backbone.source_name(name, narrow) for name in cut} <= held


def test_an_order_that_is_none_is_refused(backbone):
    orders = shuffled(backbone)
    name = next(iter(orders))
    with pytest.raises(ValueError, match=f"{name}: expected an order of"):
        permute(backbone, {**orders, name: [0] * len(orders[name])})


def test_a_place_finds_the_entries_of_its_units_by_hand():
    qkv = Place("qkv", 0, 2, 3)  # two heads of two channels, in three parts
    assert qkv.entries(torch.tensor([1, 0])).tolist() == [2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9]
    assert qkv.per_unit(torch.arange(12.0)).tolist() == [0 + 1 + 4 + 5 + 8 + 9, 2 + 3 + 6 + 7 + 10 + 11]
    assert Place("fc2", 1).per_unit(torch.tensor([[1.0, 2], [3, 4]])).tolist() == [4, 6]


def test_the_largest_weights_have_the_largest_magnitude(backbones):
    model = copy.deepcopy(backbones["vit"])
    mlp = model.blocks[1].mlp
    with torch.no_grad():
        for tensor in (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight.T):
            tensor[5] *= 9
        model.blocks[2].ls2.gamma.mul_(9)
    assert magnitudes(model)["blocks.1.mlp.hidden"].argmax() == 5
    norms = written_by_blocks(model)
    assert max(range(len(norms)), key=lambda i: norms[i]) == 2
    expected = (model.blocks[0].ls1.gamma[:, None] * model.blocks[0].attn.proj.weight).square().sum()
    expected += (model.blocks[0].ls2.gamma[:, None] * model.blocks[0].mlp.fc2.weight).square().sum()
    assert norms[0] == pytest.approx(expected.item())
