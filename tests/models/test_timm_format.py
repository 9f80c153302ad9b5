import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scenes import write_tar

from pipeline.config import ExperimentConfig, parse_config
from pipeline.data.eval_images import EvalImages
from pipeline.data.intake import Intake
from pipeline.data.shards import index
from pipeline.elastic import Grid, build
from pipeline.evaluate.targets import directory_target
from pipeline.models.card import use
from pipeline.models.timm_format import hub_config, preprocessing

MODEL = {
    "image_size": 16,
    "patch_size": 4,
    "head_dim": 16,
    "width": {"min": 16, "max": 32, "step": 16},
    "depth": {"min": 2, "max": 4, "step": 2},
}


def written(folder: Path, channels: int, values: dict[str, object]) -> ExperimentConfig:
    """A model as `poa extract` writes it, and the experiment that it is of."""
    crops = {"global_crops": {"size": 16}, "local_crops": {"size": 8}}
    tree = {"model": MODEL | {"in_chans": channels}, "data": values | crops, "engine": {"kernels": "eager"}}
    config = parse_config(tree)
    export = build(config.model).export(Grid(config.model).smallest)
    (folder / "config.json").write_text(json.dumps(hub_config(config, export)))
    save_file({name: weight.contiguous() for name, weight in export.state_dict.items()}, folder / "model.safetensors")
    return config


def test_model_of_other_images_carries_how_they_are_read(tmp_path: Path) -> None:
    values = {"value_range": [0, 4095], "mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7, 0.8]}
    config = written(tmp_path, 4, values)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    found = timm.data.resolve_data_config(model.pretrained_cfg)
    assert found["input_size"] == (4, 16, 16)
    assert (list(found["mean"]), list(found["std"])) == (values["mean"], values["std"])
    assert model(torch.zeros(1, 4, 16, 16)).shape == (1, 16)
    assert directory_target(tmp_path).intake[:2] == Intake.of_experiment(config)[:2] == (4, (0, 4095))


@pytest.mark.parametrize(
    ("channels", "dtype", "values"),
    [
        (3, "u1", {}),
        (4, "<u2", {"value_range": [0, 4095], "mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7, 0.8]}),
        (1, ">f4", {"value_range": [-0.5, 1.5], "mean": [0.4], "std": [0.2]}),
    ],
)
def test_lines_of_the_card_see_what_evaluation_sees(
    channels: int, dtype: str, values: dict[str, object], tmp_path: Path
) -> None:
    config = written(tmp_path, channels, values)
    rng = np.random.default_rng(0)
    image: object = rng.normal(0.5, 1, (24, 20, channels)) if "f" in dtype else rng.integers(0, 255, (24, 20, 3))
    image = np.resize(image, (24, 20, channels) if channels > 1 else (24, 20)).astype(dtype)
    file = io.BytesIO()
    if values:
        np.save(file, image * 20 if "u" in dtype else np.where(image > 1, np.nan, image).astype(dtype))
        image = np.load(io.BytesIO(file.getvalue()))
    else:
        image = Image.fromarray(image)
        image.save(file, "png")
    text = use(config, Grid(config.model).smallest, 16)
    assert ("in_chans" in text) == (channels == 3)
    lines = text.split("```")[1].removeprefix("python").replace("PATH_OF_THIS_DIRECTORY", str(tmp_path))
    scope: dict[str, object] = {"image": image}
    exec(lines, scope)
    shard = tmp_path / "a.tar"
    write_tar(shard, iter([("a.npy" if values else "a.png", file.getvalue())]))
    index(str(shard))
    seen = EvalImages(str(shard), preprocessing(config), Intake.of_experiment(config))
    expected = scope["model"](seen.normalize(seen.load(0)[None]))  # type: ignore[operator]
    assert torch.allclose(scope["features"], expected, atol=1e-5)  # type: ignore[arg-type]
