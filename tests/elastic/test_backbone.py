"""What every family promises: one set of tests over the three."""

import copy

import pytest
import torch

from pipeline.elastic import Subnet, build
from pipeline.elastic.cost import params
from pipeline.elastic.stochastic_depth import keep_indices


def crops_of(backbone, batches=(3, 4)):
    """A group at the training size and one at half of it."""
    size = backbone.config.image_size
    generator = torch.Generator().manual_seed(1)
    sides = (size, size // 2 if size != 96 else 32)
    return [torch.randn(b, 3, side, side, generator=generator) for b, side in zip(batches, sides, strict=True)]


def middle(backbone) -> Subnet:
    """A sub-network smaller than the full one in width and in depth."""
    return backbone.grid.subnets[len(backbone.grid) // 2 - 2]


def trainable(family, tiny_config, scramble, **options):
    model = build(tiny_config(family), **options)
    scramble(model)
    return model


def loss(features):
    return sum(f.cls.square().mean() + f.patches.square().mean() for f in features)


def gradients(model, *args, **kwargs):
    model.zero_grad()
    loss(model.forward_crops(*args, **kwargs)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_crop_groups_together_equal_each_alone(backbone):
    crops, subnet = crops_of(backbone), middle(backbone)
    together = backbone.forward_crops(crops, subnet)
    for group, images in zip(together, crops, strict=True):
        alone = backbone(images, subnet)
        torch.testing.assert_close(group.cls, alone.cls)
        torch.testing.assert_close(group.patches, alone.patches)
        rows, cols = backbone.patch_grid(images.shape[2])
        assert group.patches.shape == (len(images), rows * cols, backbone.feature_dim(subnet))


def test_no_subnet_means_the_full_network(backbone):
    images = crops_of(backbone)[0]
    assert torch.equal(backbone(images).cls, backbone(images, backbone.grid.largest).cls)


def test_images_of_a_batch_do_not_see_each_other(backbone):
    images, subnet = crops_of(backbone)[0], middle(backbone)
    torch.testing.assert_close(backbone(images, subnet).cls[1:2], backbone(images[1:2], subnet).cls)


@pytest.mark.parametrize("name", ["vit", "eva", "swin"])
def test_masked_pixels_do_not_reach_the_features(name, backbones):
    backbone = backbones[name]
    images, subnet = crops_of(backbone)[0], middle(backbone)
    rows, cols = backbone.patch_grid(images.shape[2])
    mask = torch.zeros(len(images), rows, cols, dtype=torch.bool)
    mask[:, : rows // 2] = True
    changed = images.clone()
    changed[:, :, : images.shape[2] // 2] += 1
    before, after = (backbone(x, subnet, mask.flatten(1)) for x in (images, changed))
    torch.testing.assert_close(before.cls, after.cls)
    assert not torch.allclose(backbone(images, subnet).cls, backbone(changed, subnet).cls)
    changed[:, :, -1] += 1
    assert not torch.allclose(before.cls, backbone(changed, subnet, mask.flatten(1)).cls)


@pytest.mark.parametrize("name", ["vit", "eva", "swin"])
def test_masks_follow_the_order_of_patches(name, backbones):
    """Masking one patch of one image changes that image alone, most of all at that patch."""
    backbone = backbones[name]
    images, subnet = crops_of(backbone)[0], middle(backbone)
    rows, cols = backbone.patch_grid(images.shape[2])
    mask = torch.zeros(len(images), rows, cols, dtype=torch.bool)
    mask[1, 2:4, :2] = True
    plain, masked = backbone(images, subnet), backbone(images, subnet, mask.flatten(1))
    torch.testing.assert_close(plain.patches[[0, 2]], masked.patches[[0, 2]])
    assert mask[1].flatten()[(plain.patches - masked.patches)[1].norm(dim=-1).argmax()]


def test_resnet_masks_cells_of_the_map_after_the_stem(backbones):
    """There its norms would spread any change over the image: look at what enters the first block."""
    model = backbones["resnet"]
    images, inputs = crops_of(model)[0], []
    hook = model.layer1[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    mask = torch.zeros(len(images), 4, 4, dtype=torch.bool)
    mask[1, 2, 0] = True
    model(images)
    model(images, masks=mask.flatten(1))
    hook.remove()
    plain, masked = (x.permute(0, 2, 3, 1) for x in inputs)
    cell = torch.zeros(len(images), 16, 16, dtype=torch.bool)
    cell[1, 8:12, :4] = True
    assert torch.equal(masked[~cell], plain[~cell])
    assert torch.equal(masked[cell], model.mask_token.expand(16, -1))


def test_mask_token_is_in_the_graph_even_if_nothing_is_masked(family, tiny_config, scramble):
    model = trainable(family, tiny_config, scramble)
    images = crops_of(model)[0]
    rows, cols = model.patch_grid(images.shape[2])
    empty = torch.zeros(len(images), rows * cols, dtype=torch.bool)
    grads = gradients(model, [images], model.grid.largest, [empty])
    assert set(grads) == {name for name, _ in model.named_parameters()}
    assert grads["mask_token"].abs().max() == 0
    plain = gradients(model, [images], model.grid.largest)
    assert all(torch.equal(grads[name], plain[name]) for name in plain)


def test_a_subnet_trains_all_that_it_computes_with_and_nothing_else(family, tiny_config, scramble):
    """What has no gradient may take any value. (Without ReLU, so that no unit is dead.)"""
    model = trainable(family, tiny_config, scramble)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.Softplus())
    crops, subnet = crops_of(model), middle(model)
    grads = gradients(model, crops, subnet)
    before = [group.cls for group in model.forward_crops(crops, subnet)]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.where(grads[name] == 0, 1.0, 0.0) if name in grads else 1.0)
    torch.testing.assert_close([group.cls for group in model.forward_crops(crops, subnet)], before)
    assert params(model.config, subnet) == pytest.approx(sum((g != 0).sum().item() for g in grads.values()), rel=0.01)


def test_features_do_not_depend_on_the_order_of_calls(backbone):
    """There is no state: a sub-network gives the same bits after any other one ran."""
    images = crops_of(backbone)[0]
    first = backbone(images, backbone.grid.smallest).cls
    backbone(images, backbone.grid.largest)
    assert torch.equal(backbone(images, backbone.grid.smallest).cls, first)


@pytest.mark.parametrize("option", ["activation_checkpointing", "sharded"])
def test_ways_to_run_blocks_change_no_bit(option, family, tiny_config, scramble):
    plain = trainable(family, tiny_config, scramble)
    other = trainable(family, tiny_config, scramble, **{option: True})
    crops, subnet = crops_of(plain), middle(plain)
    keep = keep_indices(0, 0, 0, 0, 0.4, [3, 4], plain.num_draws, "cpu")
    expected, got = (gradients(model, crops, subnet, keep=keep) for model in (plain, other))
    assert set(expected) == set(got)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_skipped_blocks_are_called_if_asked(family, tiny_config):
    calls = {}
    for option in (False, True):
        model = build(tiny_config(family), sharded=option)
        counter = []
        for block in model.elastic_blocks():
            block.register_forward_hook(lambda *_, counter=counter: counter.append(1))
        model(crops_of(model)[0], model.grid.smallest)
        calls[option] = len(counter)
    assert calls == {False: sum(model.grid.smallest.depths), True: len(model.elastic_blocks())}


def test_layers_are_numbered_from_the_input(backbone):
    ids = {name: backbone.layer_id(name) for name, _ in backbone.named_parameters()}
    blocks = len(backbone.elastic_blocks())
    assert set(range(blocks + 1)) <= set(ids.values()) <= set(range(blocks + 2))
    assert ids["mask_token"] == 0
    for i, block in enumerate(backbone.elastic_blocks()):
        own = {id(p) for p in block.parameters()}
        assert {ids[name] for name, p in backbone.named_parameters() if id(p) in own} == {i + 1}


def test_only_the_final_norm_is_the_last_layer(backbone, family):
    last = {name for name, _ in backbone.named_parameters() if backbone.layer_id(name) == backbone.num_layers}
    if family == "resnet":  # which has none: its last block learns at the full rate
        assert last == {f"layer4.0.{name}" for name, _ in backbone.layer4[0].named_parameters()}
    else:
        assert last == {"norm.weight", "norm.bias"}


def test_patch_merging_belongs_to_the_block_after_it(backbones):
    assert backbones["swin"].layer_id("layers.2.downsample.reduction.weight") == 5
    assert backbones["swin"].layer_id("layers.2.blocks.0.mlp.fc1.weight") == 5


def test_norms_biases_and_layer_scale_are_not_decayed(backbone):
    kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm)
    norms = {n for n, m in backbone.named_modules() if isinstance(m, kinds)}
    for name, _ in backbone.named_parameters():
        module, _, leaf = name.rpartition(".")
        exempt = module in norms or leaf in ("bias", "gamma", "gamma_1", "gamma_2", "relative_position_bias_table")
        assert backbone.no_weight_decay(name) == exempt, name
    assert norms


def test_the_patch_embedding_is_known_by_name(backbone, family):
    found = {name for name, _ in backbone.named_parameters() if backbone.is_patch_embed(name)}
    assert bool(found) == (family != "resnet")
    assert all(backbone.layer_id(name) == 0 for name in found)


def test_timm_weights_go_in_and_out(backbone, family, tiny_config):
    other = build(tiny_config(family))
    other.load_timm_state_dict(backbone.timm_state_dict())
    images = crops_of(backbone)[0]
    with torch.inference_mode():  # where weights need gradients, fused attention takes another path
        assert torch.equal(other(images).cls, backbone(images).cls)
    assert set(other.state_dict()) - set(other.timm_state_dict()) == {"mask_token"}


def test_wrong_timm_weights_are_refused_and_nothing_is_loaded(family, tiny_config):
    model = build(tiny_config(family))
    before = copy.deepcopy(model.state_dict())
    state = {name: tensor + 1 for name, tensor in model.timm_state_dict().items()}
    first, second, *_ = state
    with pytest.raises(ValueError, match=f"{first} is missing"):
        model.load_timm_state_dict({name: tensor for name, tensor in state.items() if name != first})
    with pytest.raises(ValueError, match=r"head\.extra is unknown"):
        model.load_timm_state_dict({**state, "head.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"{second} is \[1\], not"):
        model.load_timm_state_dict({**state, second: torch.zeros(1)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_impossible_inputs_are_refused(backbone):
    size = backbone.config.image_size
    with pytest.raises(ValueError, match="not in the grid"):
        backbone(torch.zeros(1, 3, size, size), Subnet(8, (1,)))
    with pytest.raises(ValueError, match="divisible"):
        backbone(torch.zeros(1, 3, size + 1, size))


def test_initialisation_follows_torch_seed(family, tiny_config):
    def first_weights(seed):
        torch.manual_seed(seed)
        return build(tiny_config(family)).state_dict()

    a, b, c = first_weights(0), first_weights(0), first_weights(1)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_unknown_kernels_are_refused(tiny_config):
    for family in ("vit", "eva", "swin"):
        model = build(tiny_config(family), attention="cuda")
        with pytest.raises(ValueError, match="eager"):
            model(crops_of(model)[0])


@pytest.fixture
def dynamo():
    """torch.compile's settings and caches, restored afterwards."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in names}):
        yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.slow
def test_every_width_is_compiled_and_none_falls_back(dynamo, tiny_config, scramble):
    """A width is a shape, and there are more than the limit of recompilations that torch comes with, here 2."""
    dynamo.config.recompile_limit = 2
    changes = {"width": {"min": 8, "max": 32, "step": 8}, "depth": {"min": 1, "max": 2}}
    plain, compiled = (build(tiny_config("vit", **changes)) for _ in range(2))
    for model in (plain, compiled):
        scramble(model)
    compiled.compile_blocks(backend="aot_eager")
    crops = crops_of(plain)
    keep = keep_indices(0, 0, 0, 0, 0.4, [3, 4], plain.num_draws, "cpu")
    for width in plain.config.widths:
        expected, got = (gradients(model, crops, Subnet(width, (2,)), keep=keep) for model in (plain, compiled))
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == len(plain.config.widths) > 2


def test_reaching_the_limit_of_recompilations_is_an_error(dynamo, tiny_config):
    model = build(tiny_config("vit"))
    model.compile_blocks(backend="eager")
    dynamo.config.recompile_limit = 2
    images = crops_of(model)[0]
    for width in (16, 24):
        model(images, Subnet(width, (2,)))
    with pytest.raises(dynamo.exc.FailOnRecompileLimitHit):
        model(images, Subnet(32, (2,)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eva", "swin", "resnet"])
def test_blocks_of_other_families_compile_whole(name, dynamo, tiny_config, scramble):
    plain, compiled = (trainable(name, tiny_config, scramble) for _ in range(2))
    compiled.compile_blocks(backend="aot_eager")
    crops, subnet = crops_of(plain), plain.grid.smallest
    keep = keep_indices(0, 0, 0, 0, 0.4, [3, 4], plain.num_draws, "cpu")
    expected, got = (gradients(model, crops, subnet, keep=keep) for model in (plain, compiled))
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_blocks_compiled_in_bf16_train_like_eager_ones(dynamo, tiny_config, scramble):
    """The default backend with stochastic depth, whose bf16 `index_add` it has no code of its own for."""
    exact, plain, compiled = (trainable("vit", tiny_config, scramble) for _ in range(3))
    compiled.compile_blocks()
    keep = keep_indices(0, 0, 0, 0, 0.4, [3, 4], plain.num_draws, "cpu")

    def gradient(model):
        crops = [x.to(model.mask_token.dtype) for x in crops_of(model)]
        found = gradients(model, crops, middle(model), keep=keep)
        return torch.cat([found[name].float().flatten() for name in sorted(found)])

    wanted, eager, result = (gradient(model) for model in (exact, plain.bfloat16(), compiled.bfloat16()))
    assert (result - wanted).norm() < 2 * (eager - wanted).norm() < 0.1 * wanted.norm()
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
