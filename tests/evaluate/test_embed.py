"""Features as files: what stands in them, that a command goes on where it was, and the page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import encode, render, write_tar

from pipeline.cli import main
from pipeline.config import parse_config
from pipeline.evaluate import embed as module
from pipeline.evaluate.dense import feature_map
from pipeline.evaluate.embed import Wanted, both_features, embed, read_part
from pipeline.evaluate.features import pooled
from pipeline.models.loading import RunModels
from pipeline.report.embedding import embedding_page, pca


def shard(path: Path, first: int, count: int, broken: int | None = None) -> Path:
    """Pictures without labels."""
    pictures = [(f"{i:03d}.jpg", encode(render(i, i % 6, (48, 40)))) for i in range(first, first + count)]
    write_tar(path, iter((name, data[:-60] if i == broken else data) for i, (name, data) in enumerate(pictures)))
    return path


@pytest.fixture
def shards(tmp_path) -> list[str]:
    return [str(shard(tmp_path / "a.tar", 0, 5)), str(shard(tmp_path / "b.tar", 5, 7, broken=2))]


@pytest.mark.parametrize("family", ["vit", "eva", "swin", "resnet"])
def test_both_features_are_timms_and_the_mean_of_the_last_map(family, experiment):
    models = RunModels.untrained(parse_config(experiment(family)))
    model, side = models.module(models.grid.smallest), models.config.model.image_size
    images = torch.randn(2, 3, side, side)
    found = both_features(model, images)
    assert torch.allclose(found["cls"], pooled(model, images), atol=1e-6)
    assert torch.allclose(found["patch_mean"], feature_map(model, images).mean((1, 2)), atol=1e-5)


@pytest.mark.parametrize("format_", ["safetensors", "npy"])
def test_a_folder_of_features_goes_on_where_it_was(format_, trained_run, shards, tmp_path, monkeypatch):
    wanted = Wanted(trained_run, shards, tmp_path / "out", "32x2", kind="both", format=format_)
    manifest = embed(wanted)
    assert (manifest["samples"], manifest["skipped"], manifest["widths"]) == (
        11,
        {"truncated": 1},
        {"cls": 32, "patch_mean": 32},
    )
    features, part = read_part(wanted.out, 1, "patch_mean")
    assert features.shape == (6, 32)
    assert part["keys"] == ["005", "006", "008", "009", "010", "011"]
    assert part["labels"] == [None] * 6
    assert json.loads((wanted.out / "manifest.json").read_text()) == manifest
    (first,), (second,) = (list(part["files"])[:1] for part in manifest["parts"])
    (wanted.out / second).write_bytes(b"cut short by a full disk")
    made = []
    real = module._features
    monkeypatch.setattr(
        module, "_features", lambda model, images, *more: made.append(images) or real(model, images, *more)
    )
    assert embed(wanted) == manifest
    assert [str(images.dataset.paths[0]) for images in made] == [shards[1]]  # the whole part is taken as it is
    assert np.array_equal(read_part(wanted.out, 1, "patch_mean")[0], features)
    assert (wanted.out / first).is_file()


def test_a_disk_that_is_full_leaves_no_part_and_with_room_it_goes_on(
    trained_run, labelled, tmp_path, little_room, capsys
):
    words = ["embed", str(trained_run), *labelled["val"], "--out", str(tmp_path / "out"), "--map", "none"]
    with little_room(64):
        assert main(words) == 2
    assert f"({tmp_path / 'out' / 'manifest.json'})" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    with little_room(4096):
        assert main(words) == 2
    assert f"({tmp_path / 'out' / 'part-000000.safetensors'})" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]
    assert main(words) == 0


def test_the_command_writes_features_and_a_page(trained_run, labelled, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["embed", str(trained_run), *labelled["val"], "--out", str(out), "--subnet", "32x2", "--map", "pca"]) == 0
    )
    assert f"map: {out}/map.html" in capsys.readouterr().out
    page = (out / "map.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)  # self-contained
    assert page.count("<circle") == json.loads((out / "manifest.json").read_text())["samples"]
    assert page.count("data:image/jpeg") > 10
    assert main(["embed", str(trained_run), *labelled["val"], "--out", str(out), "--subnet", "64x4"]) == 2
    assert capsys.readouterr().err.startswith("error: it holds features with another value of 'model'")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert main(["embed", str(trained_run), *labelled["val"], "--out", str(tmp_path / "mine")]) == 2
    assert "no features of ours" in capsys.readouterr().err


def test_a_map_of_many_images_takes_them_evenly_from_all_parts(trained_run, shards, tmp_path, monkeypatch):
    manifest = embed(Wanted(trained_run, shards, tmp_path / "out", "32x2"))
    monkeypatch.setattr("pipeline.report.embedding.POINTS", 4)
    page = embedding_page(tmp_path / "out", manifest, "pca")
    keys = re.findall(r"<circle[^>]*><title>(\d+)</title>", page)
    assert keys == ["000", "003", "006", "010"]  # every third of the eleven that could be read


def test_pca_finds_the_plane_in_which_points_lie():
    random = np.random.default_rng(0)
    plane = random.normal(size=(200, 2)) * [5, 2]
    rotation = np.linalg.qr(random.normal(size=(6, 6)))[0][:2]
    places, about = pca(plane @ rotation)
    assert "100% of the variance" in about
    distances = [np.linalg.norm(p[:, None] - p[None], axis=2) for p in (places, plane)]
    assert np.allclose(*distances, atol=1e-9)
