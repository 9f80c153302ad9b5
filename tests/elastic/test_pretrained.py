"""`model.init_from`: a run starts from weights that timm can read."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.config import ModelConfig
from pipeline.elastic import build
from pipeline.elastic.pretrained import load_pretrained
from pipeline.errors import UserError


@pytest.fixture
def save(tmp_path):
    """Writes a timm model as a directory that `local-dir:` reads."""

    def write(model, architecture, args):
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        pretrained = {"input_size": [3, 64, 64], "num_classes": args.get("num_classes", 0), "fixed_input_size": False}
        classifier = {"vit": "head", "swin": "head.fc", "resnet": "fc"}[architecture.split("_")[0].rstrip("0123456789")]
        config = {
            "architecture": architecture,
            "num_classes": args.get("num_classes", 0),
            "model_args": args,
            "pretrained_cfg": {**pretrained, "classifier": classifier},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def other_weights(backbone, **changes):
    torch.manual_seed(1)
    args = {**backbone.model_args(backbone.grid.largest), **changes}
    return timm.create_model(backbone.architecture, **args).eval(), args


def test_features_at_the_start_equal_those_of_the_timm_model(family, tiny_config, save):
    backbone = build(tiny_config(family))
    model, args = other_weights(backbone, num_classes=7)
    load_pretrained(backbone, save(model, backbone.architecture, args))
    images = torch.randn(2, 3, backbone.config.image_size, backbone.config.image_size)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        got = backbone(images).cls
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if family == "swin" else 0)
    assert backbone.mask_token.abs().max() == 0


def test_positions_of_another_image_size_are_resized_by_timm(tiny_config, save):
    backbone = build(tiny_config("vit"))
    model, args = other_weights(backbone, img_size=64)
    load_pretrained(backbone, save(model, backbone.architecture, args))
    assert torch.equal(backbone.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    model.set_input_size(32)
    assert torch.equal(backbone.pos_embed, model.pos_embed)


def test_another_size_is_a_user_error(family, tiny_config, save):
    backbone = build(tiny_config(family))
    changes = {
        "vit": {"depth": 4},
        "eva": {"depth": 4},
        "swin": {"depths": [2, 2, 4, 2]},
        "resnet": {"layers": [1, 2, 2, 1]},
    }[family]
    model, args = other_weights(backbone, **changes)
    with pytest.raises(UserError, match=r"is missing.*choose a model with the sizes of"):
        load_pretrained(backbone, save(model, backbone.architecture, args))


@pytest.mark.parametrize(("ours", "advice"), [(None, "a number"), (0.1, "null")])
def test_layer_scale_on_one_side_only_is_explained(ours, advice, tiny_config, save):
    backbone = build(tiny_config("vit", layer_scale=ours))
    model, args = other_weights(backbone, init_values=None if ours else 0.1)
    with pytest.raises(UserError, match=f"set model.layer_scale to {advice}"):
        load_pretrained(backbone, save(model, backbone.architecture, args))


def test_a_checkpoint_with_a_missing_weight_is_refused(tiny_config, save):
    backbone = build(tiny_config("vit"))
    model, args = other_weights(backbone)
    folder = save(model, backbone.architecture, args)
    state = model.state_dict()
    del state["blocks.0.mlp.fc1.weight"]
    save_file(state, f"{folder}/model.safetensors")
    with pytest.raises(UserError, match="timm cannot load it"):
        load_pretrained(backbone, folder)


def test_a_run_is_said_to_be_one(tiny_config, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=rf"this is a run: poa extract {tmp_path} --bundle DIR, then set"):
        load_pretrained(build(tiny_config("vit")), str(tmp_path))


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("no_such_model", "name a timm model or a directory"),
        ("vit_small_patch16_dinov33", r"name a timm model \(vit_small_patch16_dinov3, "),
        ("vit_small_patch16_dinov3.lvd", r"timm has published weights as vit_small_patch16_dinov3\.lvd1689m$"),
        ("no/such/folder", "there is no such directory"),
        (".", "name a timm model or a directory"),
    ],
)
def test_a_source_that_timm_cannot_read_is_a_user_error_with_a_way_out(source, fix, tiny_config):
    with pytest.raises(UserError, match=rf"init_from={source}\): .*{fix}") as raised:
        load_pretrained(build(tiny_config("vit")), source)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("vit_base_patch14_dinov2", {"family": "vit", "patch_size": 14}),
        ("vit_large_patch14_reg4_dinov2", {"family": "vit", "patch_size": 14, "registers": 4}),
        ("vit_base_patch16_dinov3", {"family": "eva", "patch_size": 16}),
        ("vit_small_plus_patch16_dinov3", {"family": "eva", "patch_size": 16, "swiglu": True}),
    ],
)
def test_the_published_architectures_load_at_another_image_size(name, keys, save):
    """Small in width and depth and with weights at random; all else is what timm registers under the name."""
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=0, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder, side = save(model, name, sizes), 2 * keys["patch_size"]
    grid = {"width": {"min": 16, "max": 32, "step": 16}, "depth": {"min": 1, "max": 2}}
    backbone = build(ModelConfig.model_validate({**keys, **grid, "image_size": side, "head_dim": 16}))
    load_pretrained(backbone, folder)
    resized = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=side, global_pool="token").eval()
    images = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        assert torch.equal(backbone(images).cls, resized(images))


def test_registers_on_one_side_only_are_explained(tiny_config, save):
    backbone = build(tiny_config("vit"))
    model, args = other_weights(backbone, reg_tokens=2, no_embed_class=True)
    with pytest.raises(UserError, match=r"set model\.registers=2, as in the source"):
        load_pretrained(backbone, save(model, backbone.architecture, args))


@pytest.mark.parametrize("name", ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_large_patch16_dinov3.lvd1689m"])
def test_a_hub_that_cannot_be_reached_is_a_user_error_that_says_how_to_go_on(name, tiny_config, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub")

    assert name in timm.list_pretrained(name)  # what the name stands for is resolved without a network
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=rf"hf download timm/{name} --local-dir DIR`, then set model\.init_from=DIR"):
        load_pretrained(build(tiny_config("vit")), name)
