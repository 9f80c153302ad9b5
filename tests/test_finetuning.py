"""The code of docs/finetuning.md as it stands, but for the names of models and shards."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.models.extract import extract

PAGE = Path(__file__).parent.parent / "docs" / "finetuning.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def model(trained_run, tmp_path_factory) -> str:
    return str(extract(trained_run, ["64x4"], tmp_path_factory.mktemp("models"), proof_images=1)[0].path)


def run(block: str, **lines: str) -> dict:
    """Run a block with some of its assignments replaced."""
    for names, value in lines.items():
        pattern = re.compile(rf"^{names.replace('__', ', ')} = .*$", re.MULTILINE)
        assert len(pattern.findall(block)) == 1
        block = pattern.sub(f"{names.replace('__', ', ')} = {value}", block)
    scope: dict = {}
    exec(compile(block, str(PAGE), "exec"), scope)
    return scope


def test_an_extracted_model_is_fine_tuned_from_shards(model, photos):
    torch.manual_seed(0)
    settings = f'"{model}", "{photos}", 10, 1, 20'
    splits = '{"train": "train-000000.tar|120", "val": "val-000001.tar|120"}'
    found = run(BLOCKS[0], MODEL__SHARDS__CLASSES__EPOCHS__BATCH=settings, SPLITS=splits)
    assert found["count"] >= 100
    assert found["loss"].isfinite()
    assert 0 <= found["accuracy"] <= 1


def test_a_detector_on_an_extracted_model_makes_a_step(model):
    torch.manual_seed(0)
    before = run(BLOCKS[1].partition("detector.train()")[0], MODEL__SIDE__CLASSES=f'"{model}", 64, 3')
    torch.manual_seed(0)
    found = run(BLOCKS[1], MODEL__SIDE__CLASSES=f'"{model}", 64, 3')
    assert set(found["losses"]) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(loss.isfinite() for loss in found["losses"].values())
    changed = [
        not torch.equal(old, new)
        for old, new in zip(before["backbone"].body.parameters(), found["backbone"].body.parameters(), strict=True)
    ]
    assert any(changed)
