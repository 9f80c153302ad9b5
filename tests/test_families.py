"""The commands on a trained run, for every family from one place."""

import json
import shutil
import tarfile
from functools import cache, partial

import pytest
import timm
import torch

from pipeline.cli import main
from pipeline.data.eval_images import EvalImages
from pipeline.models.loading import RunModels
from pipeline.models.proof import TOLERANCE
from pipeline.models.timm_format import preprocessing

OTHER_SIZES = (96, 160)  # beside the training size of 32 (ViT, Eva) or 64 px; maps that windows do and do not fill


@pytest.fixture(scope="module", params=["vit", "eva", "swin", "resnet"])
def run(request, trained_runs):
    return trained_runs(request.param)


@pytest.fixture(scope="module")
def models(run):
    return RunModels.open(run)


def test_training_logs_finite_losses_of_both_students_on_its_subnets(run, models):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    for record in records:
        assert record["bad_steps"] == 0
        assert all(record[f"dino_{branch}"] > 0 for branch in ("intact", "elastic"))
        assert models.grid.parse(record["subnet"]) != models.grid.largest
    assert records[-1]["ibot_intact"] > 0


def test_every_extracted_model_equals_its_subnet_on_real_images_of_several_sizes(
    run, models, labelled_photos, tmp_path, capsys
):
    assert main(["extract", str(run), "--all", "--out", str(tmp_path), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert sorted(entry["name"] for entry in results) == sorted(subnet.name for subnet in models.grid.subnets)
    assert all(entry["max_abs_difference"] <= TOLERANCE for entry in results)
    pictures = {}
    for size in OTHER_SIZES:
        source = EvalImages(labelled_photos["val"], preprocessing(models.config) | {"input_size": [3, size, size]})
        pictures[size] = source.normalize(torch.stack([source.load(record) for record in (0, 7)]))
    for subnet in models.grid.subnets:
        load = cache(partial(timm.create_model, f"local-dir:{tmp_path / subnet.name}", pretrained=True))
        for size, images in pictures.items():
            model = load(**({} if models.config.model.family == "resnet" else {"img_size": size})).eval()
            with torch.inference_mode():
                difference = (model(images) - models.backbone(images, subnet).cls).abs().max().item()
            assert difference <= TOLERANCE, (subnet, size)


def test_subnets_are_listed_as_they_are_extracted(run, models, capsys):
    assert main(["subnets", str(run), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [subnet.name for subnet in models.grid.subnets]
    for subnet in (models.grid.smallest, models.grid.largest):
        parameters = sum(p.numel() for p in models.module(subnet).parameters())
        assert rows[subnet.name]["params"] == parameters
        assert (rows[subnet.name]["width"], tuple(rows[subnet.name]["depths"])) == (subnet.width, subnet.depths)


@pytest.fixture(scope="module")
def few(labelled, tmp_path_factory):
    """A shard of forty pictures."""
    path = tmp_path_factory.mktemp("few") / "val-000000.tar"
    with tarfile.open(labelled["val"][0]) as whole, tarfile.open(path, "w") as part:
        for member in whole.getmembers()[: 2 * 40]:  # a picture and its label each
            part.addfile(member, whole.extractfile(member))
    return str(path)


@pytest.mark.parametrize("method", ["knn", "linear"])
def test_the_smallest_and_the_largest_subnet_are_evaluated(run, models, few, tmp_path, capsys, method):
    copied = shutil.copytree(run, tmp_path / "run")
    names = [models.grid.smallest.name, models.grid.largest.name]
    words = ["--train", few, "--val", few, "--subnets", ",".join(names), "--json"]
    assert main(["eval", method, str(copied), *words]) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results) == names
    assert all(0 < entry["accuracy"] <= 1 for entry in results.values())
    assert results == json.loads((copied / "eval" / f"{method}.json").read_text())


def test_a_plan_can_be_made(run, capsys):
    assert main(["plan", str(run / "config.yaml"), "--gpus", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
