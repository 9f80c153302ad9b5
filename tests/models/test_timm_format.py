import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from pipeline.config import parse_config
from pipeline.data.intake import Intake
from pipeline.elastic import Grid, build
from pipeline.evaluate.targets import directory_target
from pipeline.models.timm_format import hub_config

MODEL = {
    "image_size": 16,
    "patch_size": 4,
    "head_dim": 16,
    "width": {"min": 16, "max": 32, "step": 16},
    "depth": {"min": 2, "max": 4, "step": 2},
}


def test_model_of_other_images_carries_how_they_are_read(tmp_path: Path) -> None:
    values = {"value_range": [0, 4095], "mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7, 0.8]}
    crops = {"global_crops": {"size": 16}, "local_crops": {"size": 8}}
    tree = {"model": MODEL | {"in_chans": 4}, "data": values | crops, "engine": {"kernels": "eager"}}
    config = parse_config(tree)
    backbone = build(config.model)
    export = backbone.export(Grid(config.model).smallest)
    (tmp_path / "config.json").write_text(json.dumps(hub_config(config, export)))
    save_file({name: weight.contiguous() for name, weight in export.state_dict.items()}, tmp_path / "model.safetensors")
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    found = timm.data.resolve_data_config(model.pretrained_cfg)
    assert found["input_size"] == (4, 16, 16)
    assert (list(found["mean"]), list(found["std"])) == (values["mean"], values["std"])
    assert model(torch.zeros(1, 4, 16, 16)).shape == (1, 16)
    assert directory_target(tmp_path).intake[:2] == Intake.of_experiment(config)[:2] == (4, (0, 4095))
