"""Every sub-network of a small grid, extracted, is the sub-network in place: one place for all families."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.elastic import Subnet


def difference(backbone, subnet, model, images):
    """Largest difference of pooled features and of the map between `model` and the sub-network in place."""
    with torch.inference_mode():
        ours, theirs = backbone(images, subnet), model.eval()(images)
        tokens = model.forward_features(images)
    if tokens.ndim == 4:
        tokens = tokens if backbone.config.family == "swin" else tokens.permute(0, 2, 3, 1)
        tokens = tokens.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    else:
        tokens = tokens[:, 1 + backbone.config.registers :]
    return max((ours.cls - theirs).abs().max().item(), (ours.patches - tokens).abs().max().item())


def bound(family: str) -> float:
    """Swin in timm multiplies attention out in steps, here it is one fused call; the others are bit for bit."""
    return 1e-5 if family == "swin" else 0.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Writes an Export as a directory that timm's `local-dir:` reads."""

    def write(export, image_size):
        folder = tmp_path_factory.mktemp("model")
        save_file(export.state_dict, folder / "model.safetensors")
        config = {
            "architecture": export.architecture,
            "num_classes": 0,
            "num_features": export.feature_dim,
            "global_pool": export.pool,
            "model_args": export.model_args,
            "pretrained_cfg": {"input_size": [3, image_size, image_size], "num_classes": 0, "fixed_input_size": False},
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def test_full_network_equals_timm(backbone, family):
    model = timm.create_model(backbone.architecture, **backbone.model_args(backbone.grid.largest))
    model.load_state_dict(backbone.timm_state_dict())
    size = backbone.config.image_size
    images = torch.randn(2, 3, size, size)
    assert difference(backbone, backbone.grid.largest, model, images) <= bound(family)


def test_every_extracted_model_equals_its_subnet_in_place(backbone, family, monkeypatch):
    for draw in ("uniform_", "normal_"):  # weights that are loaded afterwards, without exception, need not be drawn
        monkeypatch.setattr(torch.Tensor, draw, lambda weight, *_, **__: weight)
    size = backbone.config.image_size
    images = torch.randn(2, 3, size, size)
    seen = set()
    for subnet in backbone.grid.subnets:
        export = backbone.export(subnet)
        model = timm.create_model(export.architecture, **export.model_args)
        model.load_state_dict(export.state_dict)
        assert difference(backbone, subnet, model, images) <= bound(family), subnet
        with torch.inference_mode():
            features = backbone(images, subnet).cls
        assert features.shape[1] == export.feature_dim == backbone.feature_dim(subnet)
        assert features.std() > 0.01
        seen.add(features.double().sum().item())
    assert len(seen) == len(backbone.grid)  # no two sub-networks are one


def test_extracted_models_hold_at_another_image_size(backbone, family, model_dir, other_size):
    """timm itself rebuilds the model for the other size, resizing positions and biases."""
    images = torch.randn(2, 3, other_size[family], other_size[family])
    size = {} if family == "resnet" else {"img_size": other_size[family]}
    for subnet in (backbone.grid.smallest, backbone.grid.subnets[-3]):
        folder = model_dir(backbone.export(subnet), backbone.config.image_size)
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, **size)
        assert difference(backbone, subnet, model, images) <= bound(family), subnet


def test_export_goes_through_a_local_directory_unchanged(backbone, family, model_dir):
    size = backbone.config.image_size
    subnet = backbone.grid.subnets[1]
    model = timm.create_model(f"local-dir:{model_dir(backbone.export(subnet), size)}", pretrained=True)
    assert difference(backbone, subnet, model, torch.randn(2, 3, size, size)) <= bound(family)


def test_extraction_refuses_what_is_not_in_the_grid(backbone):
    with pytest.raises(ValueError, match="not in the grid"):
        backbone.export(Subnet(7, (1,)))


def test_an_export_shares_no_memory_with_the_backbone(backbone):
    state = backbone.export(backbone.grid.largest).state_dict
    own = {p.data_ptr() for p in backbone.parameters()}
    assert all(tensor.data_ptr() not in own and tensor.is_contiguous() for tensor in state.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "vit", "in_chans": 1},
        {"family": "vit", "layer_scale": None},
        {"family": "vit", "registers": 2},
        {"family": "eva", "swiglu": False, "registers": 0},
        {"family": "vit", "mlp_ratio": {"min": 1, "max": 3, "step": 1}},
        {"family": "swin", "mlp_ratio": {"min": 1, "max": 3, "step": 1}},
        {"family": "vit", "block_importance": [[0.1, 0.9, 0.2, 0.8, 0.3]]},
        {"family": "swin", "block_importance": [[1, 1], [1, 1], [0.1, 0.1, 0.8, 0.9, 0.3], [1, 1]]},
        {"family": "resnet", "block_importance": [[2], [2, 0.1], [2, 0.1, 0.3], [2]]},
        {"family": "vit", "patch_size": 4, "head_dim": 16, "width": {"min": 16, "max": 48, "step": 16}},
        {"family": "swin", "image_size": 64, "patch_size": 2, "window_size": 7},
        {"family": "resnet", "in_chans": 1},
    ],
    ids=str,
)
def test_extraction_holds_for_other_shapes(changes, tiny_config, scramble):
    from pipeline.elastic import build

    backbone = build(tiny_config(**changes))
    scramble(backbone)
    size = backbone.config.image_size
    export = backbone.export(backbone.grid.subnets[1])
    model = timm.create_model(export.architecture, **export.model_args)
    model.load_state_dict(export.state_dict)
    images = torch.randn(2, backbone.config.in_chans, size, size)
    assert difference(backbone, backbone.grid.subnets[1], model, images) <= bound(backbone.config.family)
