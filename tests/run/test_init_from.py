"""`model.init_from` in a run: timm's features at the start, then the heads learn, then everything does."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from pipeline.cli import main
from pipeline.config import parse_config
from pipeline.elastic import build
from pipeline.errors import UserError
from pipeline.method.schedules import Schedules
from pipeline.models.loading import RunModels
from pipeline.models.timm_format import hub_config

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "workers" / "head_warmup.py"


def timm_directory(config, path: Path) -> torch.nn.Module:
    """Write the largest network of a grid, with weights of its own, to a directory that `local-dir:` reads."""
    torch.manual_seed(9)
    backbone = build(config.model)
    export = backbone.export(backbone.grid.largest)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(hub_config(config, export)))
    model = timm.create_model(export.architecture, **export.model_args).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # timm starts some at zero, behind which nothing learns or shows
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    save_file(model.state_dict(), path / "model.safetensors")
    return model


@pytest.fixture
def tree(experiment, tmp_path, family):
    source = {"init_from": str(tmp_path / "source")}
    return experiment(family, model=source, optim={"steps_per_epoch": 3, "freeze_prototypes_epochs": 0})


@pytest.mark.parametrize("family", ["vit", "eva", "swin", "resnet"])
def test_a_run_starts_from_timm_and_teaches_the_heads_first(launch, tmp_path, tree, family):
    model = timm_directory(parse_config(tree), tmp_path / "source")
    images = torch.randn(2, 3, tree["model"]["image_size"], tree["model"]["image_size"])
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    ranks = 2 if family == "vit" else 1
    launch(WORKER, ranks, tmp_path / "config.yaml", tmp_path / "images.pt", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt")
    assert found["ranks agree"]
    with torch.inference_mode():
        expected = model(images)
    for cls in found["cls"].values():
        torch.testing.assert_close(cls, expected, rtol=0, atol=1e-5)
    for branch in ("student", "teacher"):
        start, *warm, after = (state[branch] for state in found["states"])
        heads = [name for name in start if name.startswith("heads.")]
        backbone = [name for name in start if name.startswith("backbone.")]
        assert torch.equal(start["backbone.mask_token"], torch.zeros_like(start["backbone.mask_token"]))
        for state in warm:
            assert all(torch.equal(state[name], start[name]) for name in backbone)
        assert not any(torch.equal(warm[-1][name], start[name]) for name in heads)
        moved = [name for name in backbone if not torch.equal(after[name], start[name])]
        assert set(backbone) - set(moved) <= {"backbone.mask_token"}  # no patch may be masked in one step
        assert not any(torch.equal(after[name], warm[-1][name]) for name in heads)


@pytest.mark.parametrize(
    ("model", "optim", "epochs"),
    [({}, {}, 0), ({"init_from": "x"}, {}, 1), ({"init_from": "x"}, {"head_warmup_epochs": 0}, 0)],
)
def test_the_heads_learn_alone_for_an_epoch_after_pretrained_weights_unless_told_otherwise(model, optim, epochs):
    config = parse_config({"model": model, "optim": {"steps_per_epoch": 7, **optim}})
    assert config.optim.head_warmup_epochs == epochs
    schedules = Schedules(config.optim, config.loss, 1024)
    assert [schedules.at(step).backbone_frozen for step in (0, 6, 7)] == [epochs == 1, epochs == 1, False]


def test_a_warm_up_of_the_heads_without_pretrained_weights_is_refused():
    with pytest.raises(UserError, match=r"head_warmup_epochs=2.*set model\.init_from"):
        parse_config({"optim": {"head_warmup_epochs": 2}})
    with pytest.raises(UserError, match="head_warmup_epochs=10 must be less than epochs=10"):
        parse_config(
            {"model": {"init_from": "x"}, "optim": {"epochs": 10, "head_warmup_epochs": 10, "warmup_epochs": 1}}
        )


@pytest.mark.parametrize("family", ["vit"])
def test_looking_at_a_config_loads_no_weights_and_training_without_them_is_a_user_error(
    tree, tmp_path, capsys, monkeypatch, free_port
):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    assert "head_warmup_epochs: 1" in capsys.readouterr().out
    assert main(["subnets", str(tmp_path / "config.yaml")]) == 0
    capsys.readouterr()
    rank = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    for name, value in rank.items():
        monkeypatch.setenv(name, str(value))
    assert main(["train", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "run")]) == 2
    assert "timm cannot load it" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["vit"])
def test_the_untrained_network_of_such_a_run_is_the_one_it_began_with(tree, tmp_path):
    config = parse_config(tree)
    model = timm_directory(config, tmp_path / "source")
    untrained = RunModels.untrained(config).backbone
    assert torch.equal(untrained.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_a_resumed_run_does_not_need_its_source_any_more(trained_run, launch, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_from"] = str(tmp_path / "gone")
    config["run"] |= {"dir": str(run), "max_steps": 9}
    for path in (run / "config.yaml", tmp_path / "config.yaml"):
        path.write_text(yaml.safe_dump(config))
    launch(ROOT / "tests" / "workers" / "train.py", 1, tmp_path / "config.yaml")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 9
