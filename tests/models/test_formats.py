"""Models in other formats, and opened in other ways, by a process that cannot import this project."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.models import formats
from pipeline.models.extract import extract
from pipeline.models.formats import FORMATS, require_packages, write_formats
from pipeline.models.loading import RunModels
from pipeline.models.timm_format import hub_config

pytest.importorskip("onnxruntime")  # an extra

STRANGER = """
import json, sys
class Unknown:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("pipeline", "kernels"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Unknown())
import onnxruntime, timm, torch
from safetensors.torch import load_file
found = {}
for path in sys.argv[1:]:
    images = load_file(path + "/images.safetensors")["images"]
    size = images.shape[-1]
    def create(**changes):
        return timm.create_model("local-dir:" + path, pretrained=True, **changes).eval()
    with torch.inference_mode():
        model = create()
        expected = model(images)
        session = onnxruntime.InferenceSession(path + "/model.onnx", providers=["CPUExecutionProvider"])
        onnx = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
        program = torch.export.load(path + "/model.pt2").module()(images)
        try:
            maps = create(features_only=True)(images)
        except AssertionError:  # a ViT of two blocks, of which timm wants three unless told which
            maps = create(features_only=True, out_indices=(0, 1))(images)
        head = create(num_classes=7)
        grey = create(in_chans=1)
        small = torch.zeros(1, 3, 2 * size, 2 * size)
        try:
            resized = list(create(img_size=2 * size)(small).shape)
        except TypeError:
            resized = list(model(small).shape)  # without positions there is nothing to resize
        found[path] = {
            "onnx": (onnx - expected).abs().max().item(),
            "torch_export": (program - expected).abs().max().item(),
            "maps": [list(m.shape) for m in maps],
            "classes": list(head(images).shape),
            "body_kept": all(torch.equal(v, head.state_dict()[k]) for k, v in model.state_dict().items()),
            "grey": (grey(images.mean(1, keepdim=True)) - model(images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
                     ).abs().max().item(),
            "resized": resized,
            "width": model.num_features,
        }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(experiment, tmp_path_factory) -> dict[str, dict]:
    """What a stranger finds in the smallest network of each family, and what its formats were proven with.

    Exporters take their time for each operator: a Swin has one block per stage, besides the first one that is shifted.
    """
    home = tmp_path_factory.mktemp("formats")
    proofs = {}
    for family in ("vit", "eva", "swin", "resnet"):
        fewest = {"depth": {"min": [2, 1, 1, 1], "max": [2, 1, 1, 1], "step": 1}} if family == "swin" else {}
        (home / f"{family}.yaml").write_text(yaml.safe_dump(experiment(family, model=fewest)))
        models = RunModels.untrained(load_config(home / f"{family}.yaml"))
        export = models.backbone.export(models.grid.smallest)
        directory = home / family
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(hub_config(models.config, export)))
        save_file(export.state_dict, directory / "model.safetensors", {"format": "pt"})
        size = models.config.model.image_size
        images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
        proofs[family] = write_formats(list(FORMATS), directory, images)
        save_file({"images": images}, directory / "images.safetensors")
    (home / "stranger.py").write_text(STRANGER)
    done = subprocess.run(
        [sys.executable, home / "stranger.py", *(str(home / family) for family in proofs)],
        cwd=home,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    return {family: seen[str(home / family)] | {"proof": proofs[family]} for family in proofs}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "eva", "swin", "resnet"])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_format_computes_what_timm_computes(found, family, name):
    proof = found[family]["proof"][name]
    assert 0 <= proof["max_abs_difference"] <= proof["tolerance"]
    assert found[family][name] <= proof["tolerance"]
    assert proof["file"] == FORMATS[name].file


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "eva", "swin", "resnet"])
def test_timm_opens_it_as_feature_maps_with_classes_and_for_grey_images(found, family):
    seen = found[family]
    assert len(seen["maps"]) == {"vit": 2, "eva": 2, "swin": 4, "resnet": 5}[family]
    assert all(len(shape) == 4 for shape in seen["maps"])
    assert seen["classes"] == [3, 7]
    assert seen["body_kept"]
    assert seen["grey"] < 1e-4  # weights of the colours are added up
    assert seen["resized"] == [1, seen["width"]]


def test_an_extraction_writes_formats_and_what_they_were_proven_with(trained_run, tmp_path, capsys):
    words = ["extract", str(trained_run), "--subnet", "32x2", "--out", str(tmp_path), "--torch-export"]
    assert main(words) == 0
    model = tmp_path / "32x2"
    proof = json.loads((model / "proof.json").read_text())
    assert proof["formats"]["torch_export"]["max_abs_difference"] <= 1e-4
    assert "model.pt2" in proof["files"]
    card = (model / "README.md").read_text()
    assert 'torch.export.load("model.pt2")' in card
    assert "`out_indices=(0, 1,)`" in card
    assert main(words[:-1]) == 0  # the same model without it
    assert not (model / "model.pt2").exists()
    assert "model.pt2" not in (model / "README.md").read_text()
    (model / "model.onnx").write_text("mine")
    assert main([*words, "--onnx"]) == 2
    assert "something else is in the way" in capsys.readouterr().err
    assert (model / "model.onnx").read_text() == "mine"


def test_a_format_that_differs_fails_the_proof_and_leaves_nothing(trained_run, tmp_path, monkeypatch, capsys):
    wrong = FORMATS["torch_export"]._replace(open=lambda path: lambda images: torch.zeros(len(images), 32))
    monkeypatch.setitem(FORMATS, "torch_export", wrong)
    assert main(["extract", str(trained_run), "--subnet", "32x2", "--out", str(tmp_path), "--torch-export"]) == 1
    assert "model.pt2 of 32x2 differs from its model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed_is_named_before_the_work(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx is not installed \(--onnx\): pip install onnx onnxscript onnxruntime"):
        extract(trained_run, ["32x2"], tmp_path / "out", formats=["onnx"])
    assert not (tmp_path / "out").exists()
    require_packages(["torch_export"])
