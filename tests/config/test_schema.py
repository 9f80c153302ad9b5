"""Keys of `model` that depend on the family."""

from pathlib import Path

import pytest
import yaml

from pipeline.config import dump_config, load_config, parse_config
from pipeline.elastic import Grid
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("vit", "window_size", 8),
        ("vit", "swiglu", True),
        ("eva", "window_size", 8),
        ("swin", "registers", 4),
        ("swin", "layer_scale", 0.1),
        ("resnet", "patch_size", 16),
        ("resnet", "head_dim", 32),
        ("resnet", "window_size", 8),
        ("resnet", "layer_scale", 0.1),
    ],
)
def test_a_key_that_the_family_does_not_read_is_refused(family, key, value):
    with pytest.raises(UserError, match=rf"{key}={value} has no effect on {family}.*leave it out"):
        parse_config({"model": {"family": family, key: value}})


def test_what_eva_cannot_do_without_is_asked_for():
    with pytest.raises(UserError, match=r"layer_scale=null.*give a number"):
        parse_config({"model": {"family": "eva", "layer_scale": None}})
    sizes = {"head_dim": 6, "width": {"min": 6, "max": 12, "step": 6}}
    with pytest.raises(UserError, match=r"head_dim=6 does not divide into pairs.*use 8"):
        parse_config({"model": {"family": "eva", **sizes}, "engine": {"kernels": "eager"}})


@pytest.mark.parametrize("family", ["vit", "eva", "swin", "resnet"])
def test_a_resolved_config_reads_back_as_itself(family):
    config = parse_config({"model": {"family": family}})
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(("family", "stride"), [("vit", 16), ("eva", 16), ("swin", 32), ("resnet", 32)])
def test_crops_must_be_multiples_of_the_stride_of_the_family(family, stride):
    assert parse_config({"model": {"family": family}}).model.stride == stride
    with pytest.raises(UserError, match=f"not divisible by {stride}"):
        parse_config({"model": {"family": family}, "data": {"local_crops": {"size": 96 + stride // 2}}})


def test_a_patch_of_another_size_changes_the_stride_of_swin():
    tree = {"model": {"family": "swin", "patch_size": 2, "image_size": 112}}
    tree["data"] = {"global_crops": {"size": 112}, "local_crops": {"size": 48}}
    assert parse_config(tree).model.stride == 16


def test_values_of_images_are_by_channel_and_make_sense() -> None:
    for channels in (1, 4, 16):
        assert parse_config({"model": {"in_chans": channels}}).model.in_chans == channels
    for tree, message in (
        ({"model": {"in_chans": 17}}, r"in_chans.*16"),
        ({"model": {"in_chans": 4}, "data": {"mean": [0.5] * 3}}, r"data\.mean has 3 values, but model\.in_chans is 4"),
        ({"data": {"std": [0.5, 0, 0.5]}}, r"std=.*above 0"),
        ({"data": {"value_range": [5, 5]}}, r"value_range=.*must rise"),
    ):
        with pytest.raises(UserError, match=message):
            parse_config(tree)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"family": "resnet", "mlp_ratio": {"min": 2}}, "mlp_ratio=.* has no effect on resnet .*leave it out"),
        ({"mlp_ratio": {"min": 3, "step": 2}}, r"model\.mlp_ratio.*3\.\.4 is not reached in steps of 2"),
        (
            {"family": "eva", "swiglu": True, "head_dim": 4, "mlp_ratio": {"min": 3}},
            "mlp_ratio 3 with head_dim=4: SwiGLU has hidden units in multiples of 8",
        ),
    ],
)
def test_mlp_ratios_that_cannot_be_are_refused_in_one_line(model, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_config({"model": model})
    assert "\n" not in str(raised.value)


def test_sources_are_read_one_by_one_and_a_mistake_names_its_own(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"

    def load(train: str):
        path.write_text(f"data:\n  train: {train}\n")
        return load_config(path).data.train

    sources = load("[{name: a, url: 'a/{0..9}.tar', weight: 3}, {name: 010, url: b.tar}]")
    assert [(s.name, s.url, s.weight) for s in sources] == [("a", "a/{0..9}.tar", 3), ("010", "b.tar", 1)]
    path.write_text(dump_config(load_config(path)))
    assert load_config(path).data.train == sources
    for train, message in {
        "[{name: a, url: a.tar, wieght: 3}]": r"wieght of source 1, there is no such key \(.*use name, url, weight",
        "[{name: a, url: a.tar}, {name: a, url: b.tar}]": "two sources are called a",
        "[{name: a, url: a.tar}, b.tar]": "entry of source 2",
        "[{name: a, url: a.tar, weight: 0}]": "weight of source 1",
        "[{name: 'a b', url: a.tar}]": "name of source 1",
        "null": r"data\.train: got null",
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            load(train)
        assert "data.train" in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", ["vit", "eva", "swin", "resnet"])
def test_a_network_alone_is_a_grid_of_one(family):
    """No other sub-network is trained, so none may be listed or extracted; the largest is built as it was."""
    ratios = {} if family == "resnet" else {"mlp_ratio": {"min": 2, "max": 4, "step": 2}}
    tree = {"model": {"family": family, **ratios}, "sampling": {"assignment": "none"}}
    model, whole = parse_config(tree).model, parse_config({"model": {"family": family, **ratios}}).model
    grid = Grid(model)
    assert grid.subnets == (Grid(whole).largest,)
    assert model.alone() == model
    assert parse_config(yaml.safe_load(dump_config(parse_config(tree)))) == parse_config(tree)


def test_a_mistake_in_the_model_of_a_network_alone_is_told_by_its_key():
    with pytest.raises(UserError, match=r"model\.width"):
        parse_config({"model": {"width": {"min": 512, "max": 384}}, "sampling": {"assignment": "none"}})
