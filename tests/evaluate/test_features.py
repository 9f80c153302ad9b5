"""Features of shards: timm's own, whatever the batch, the company and the number of ranks; nothing lost in silence."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from shapes import write_masked
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

from pipeline import load_subnet
from pipeline.data.eval_images import EvalImages
from pipeline.errors import UserError
from pipeline.evaluate import segmentation
from pipeline.evaluate.embed import read_part
from pipeline.evaluate.evaluation import Evaluation, Request, evaluate
from pipeline.evaluate.features import extract_features
from pipeline.evaluate.knn import knn_votes
from pipeline.evaluate.targets import Candidate, Target, directory_target, pixels_target, run_target
from pipeline.models.extract import extract
from pipeline.models.loading import RunModels

WORKER = Path(__file__).parent.parent / "workers" / "evaluate.py"


def png(seed: int, side: int = 40) -> bytes:
    pixels = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "png")
    return buffer.getvalue()


def write_shard(path: Path, samples: dict[str, tuple[bytes, bytes | None]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, (image, label) in samples.items():
            for extension, data in (("png", image), ("cls", label)):
                if data is not None:
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


def plain_images(shards: list[str]) -> tuple[list[Image.Image], list[int]]:
    """Images and labels by tarfile and Pillow alone."""
    images, labels = [], []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith(".cls"):
                    labels.append(int(data))
                else:
                    images.append(Image.open(io.BytesIO(data)).convert("RGB"))
    return images, labels


@pytest.fixture(scope="module")
def models(trained_run) -> dict[str, torch.nn.Module]:
    return {name: load_subnet(trained_run, name) for name in ("32x2", "64x4")}


@pytest.fixture(scope="module")
def preprocessing(trained_run) -> dict:
    return run_target(RunModels.open(trained_run), None, "teacher").preprocessing


@pytest.fixture(scope="module")
def val_images(preprocessing, labelled) -> EvalImages:
    return EvalImages(labelled["val"], preprocessing)


def test_features_are_those_of_timms_own_pipeline(models, preprocessing, labelled_photos):
    found = extract_features(models, EvalImages(labelled_photos["val"], preprocessing), threads=3, batch_size=50)
    images, labels = plain_images(labelled_photos["val"])
    assert found.labels.tolist() == labels
    for name, model in models.items():
        transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
        with torch.inference_mode():
            expected = torch.cat([model(transform(image)[None]) for image in images[:60]])
        assert torch.allclose(found.features[name][:60], expected, atol=1e-5)
        assert found.features[name].shape == (len(labels), model.num_features)


def test_company_and_batch_size_change_nothing(models, val_images):
    together = extract_features(models, val_images, batch_size=64)
    alone = extract_features({"64x4": models["64x4"]}, val_images, threads=1, batch_size=17)
    assert torch.allclose(together.features["64x4"], alone.features["64x4"], atol=1e-5)
    assert torch.equal(together.labels, alone.labels)


def test_features_that_are_not_finite_are_refused(val_images):
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    assert extract_features({"sound": model}, val_images).features["sound"].isfinite().all()
    model.append(torch.nn.Linear(48, 2))
    torch.nn.init.constant_(model[-1].bias, float("nan"))
    with pytest.raises(UserError, match=r"features that are not finite \(diverged\): .* another checkpoint"):
        extract_features({"diverged": model}, val_images)


def test_a_classifier_is_left_out(tmp_path):
    model = timm.create_model("resnet10t", num_classes=9).eval()
    save_for_hf(model, tmp_path / "classifier", safe_serialization=True)
    candidate = directory_target(tmp_path / "classifier").candidates[0]
    assert (candidate.name, candidate.feature_dim) == ("classifier", model.num_features)
    assert candidate.params == sum(p.numel() for p in model.parameters())


def test_cost_counted_from_a_directory_equals_the_formula(trained_run, tmp_path):
    path = extract(trained_run, ["48x3"], tmp_path, proof_images=1)[0].path
    from_run = run_target(RunModels.open(trained_run), ["48x3"], "teacher").candidates[0]
    from_directory = directory_target(path).candidates[0]
    for field in ("params", "feature_dim", "name"):
        assert getattr(from_directory, field) == getattr(from_run, field)
    assert from_directory.gflops == pytest.approx(from_run.gflops, rel=1e-9)


def test_left_out_samples_are_counted_by_reason_and_named(tmp_path, models, val_images, capsys):
    samples: dict[str, tuple[bytes, bytes | None]] = {f"good{i}": (png(i), b"3\n") for i in range(5)}
    samples["cut"] = (png(9)[:-40], b"3")
    samples["page"] = (b"<html>", b"3")
    samples["alone"] = (png(10), None)
    samples["named"] = (png(11), b"boot")
    samples |= {f"more{i}": (png(20 + i), b"4") for i in range(3)}
    shard = write_shard(tmp_path / "mixed.tar", samples)
    images = EvalImages(str(shard), {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3})
    found = extract_features(models, images, batch_size=3)
    assert found.labels.tolist() == [3] * 5 + [4] * 3
    assert found.skipped == {"truncated": 1, "format": 1, "unlabelled": 1, "label": 1}
    assert len(found.features["32x2"]) == 8
    messages = capsys.readouterr().err
    assert all(f"left out {key} of {shard}" in messages for key in ("cut", "page", "alone", "named"))


def test_awkward_images_are_read_or_left_out_as_they_should(odd):
    preprocessing = {"input_size": (3, 32, 32), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    images = EvalImages(str(odd / "images-000000.tar"), preprocessing)
    found = extract_features({"pixels": torch.nn.Flatten()}, images)
    entries = json.loads((odd / "odd.json").read_text())["images"]
    must = [entry["label"] for entry in entries if entry["strict"] and entry["should"] == "decode"]
    may = [entry["label"] for entry in entries if not entry["strict"]]
    assert len(must) <= len(found.labels) <= len(must) + len(may)
    assert len(found.labels) + found.skipped.total() == len(entries)
    never = sum(1 for entry in entries if entry["strict"] and entry["should"] == "skip")
    assert found.skipped.total() >= never


def test_two_ranks_get_what_one_process_gets(trained_run, labelled, val_images, models, launch, tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "LEARNING_RATES", (0.03, 0.1))  # as in the worker
    run = shutil.copytree(trained_run, tmp_path / "run")
    write_masked(labelled["val"], tmp_path / "masked")
    (masked,) = map(str, (tmp_path / "masked").glob("*.tar"))
    launch(WORKER, 2, tmp_path / "found", run, masked, *labelled["val"])
    alone = extract_features({"64x4": models["64x4"]}, val_images)
    shards = {"train": labelled["val"], "val": labelled["val"]}
    results = {method: evaluate(Request(run, method, **shards, subnets=["64x4"])) for method in ("knn", "linear")}
    segmented = evaluate(Request(run, "segment", train=masked, val=masked, subnets=["64x4"]))["64x4"]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found.{rank}")
        assert torch.equal(found["labels"], alone.labels)
        assert torch.allclose(found["features"], alone.features["64x4"], atol=1e-5)
        assert {method: found[method] for method in results} == results
        for key in ("miou", "accuracy", "knn_miou", "knn_accuracy"):  # sums in another order turn a few pixels
            assert found["segment"]["64x4"][key] == pytest.approx(segmented[key], abs=2e-3), key
        assert found["segment"]["64x4"]["train_images"] == segmented["train_images"]
    random = torch.Generator().manual_seed(0)  # the same as the worker's
    x, queries = torch.randn(45, 6, generator=random), torch.randn(9, 6, generator=random)
    whole = knn_votes(x, torch.randint(4, (45,), generator=random), queries)
    assert torch.equal(torch.load(tmp_path / "found.0")["votes"], whole)
    assert len(torch.load(tmp_path / "found.1")["votes"]) == 0
    cls, part = read_part(tmp_path / "found.parts", 0, "cls")
    assert torch.allclose(torch.from_numpy(cls), alone.features["64x4"], atol=1e-5)
    assert part["labels"] == alone.labels.tolist()


def test_groups_fit_the_memory_they_are_given():
    sizes = {"a": 100, "b": 100, "huge": 10**6, "c": 100}
    candidates = [Candidate(name, torch.nn.Flatten, 10, size, 0.0, {}) for name, size in sizes.items()]
    groups = Target(candidates, {}).groups(samples=5, budget=4 * (100 + 50) * 2)
    assert [[candidate.name for candidate in group] for group in groups] == [["a", "b"], ["huge"], ["c"]]


def test_small_groups_give_the_results_of_one(trained_run, labelled, monkeypatch):
    target = run_target(RunModels.open(trained_run), ["32x2", "48x3", "64x4"], "teacher")
    evaluation = Evaluation("knn", labelled["val"], labelled["val"])
    expected = evaluation.run(target)
    monkeypatch.setattr("pipeline.evaluate.evaluation._GROUP_BYTES", 1)
    assert evaluation.run(target) == expected


def colours(path: Path, names: list[str], classes: dict[str, tuple[int, int, int]]) -> Path:
    """A shard of plain colours with labels in the order of `names`, which `classes.txt` lists."""
    path.parent.mkdir()
    samples = {}
    for label, name in enumerate(names):
        for i in range(3):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), tuple(max(v - 9 * i, 0) for v in classes[name])).save(buffer, "png")
            samples[f"{name}{i}"] = (buffer.getvalue(), b"%d" % label)
    (path.parent / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return write_shard(path, samples)


def test_classes_of_sets_built_apart_are_compared_by_name(tmp_path):
    palette = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
    train = colours(tmp_path / "t" / "a.tar", ["blue", "green", "red"], palette)
    val = colours(tmp_path / "v" / "a.tar", ["red", "blue"], palette)
    (entry,) = Evaluation("knn", str(train), str(val)).run(pixels_target()).values()
    assert entry["accuracy"] == 1.0
    strange = colours(tmp_path / "s" / "a.tar", ["blue", "pink"], {**palette, "pink": (250, 150, 150)})
    with pytest.raises(UserError, match="1 of 2 classes are not among those of the training shards: pink"):
        Evaluation("knn", str(train), str(strange)).run(pixels_target())


def test_label_beyond_the_names_or_64_bits_is_left_out_by_name(tmp_path, capsys):
    palette = {"red": (220, 20, 20), "blue": (20, 20, 220)}
    train = colours(tmp_path / "t" / "a.tar", ["blue", "red"], palette)
    val = write_shard(tmp_path / "v.tar", {"a": (png(1), b"0"), "b": (png(2), b"9" * 20), "c": (png(3), b"1_0")})
    (tmp_path / "classes.txt").write_text("red\n")
    (entry,) = Evaluation("knn", str(train), str(val)).run(pixels_target()).values()
    assert (entry["val_images"], entry["skipped"]["val"]) == (1, {"label": 2})
    assert f"left out b of {val} (label)" in capsys.readouterr().err
