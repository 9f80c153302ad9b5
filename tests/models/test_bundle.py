"""A bundle: a run's whole state, from which other runs begin, and what of it fits them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from pipeline.config import parse_config
from pipeline.elastic import Grid, build
from pipeline.elastic.head import ProjectionHeads
from pipeline.engine.saved import intact_checkpoint, load_named, read_manifest
from pipeline.errors import UserError
from pipeline.files import sha256
from pipeline.method.tri_branch import Branch
from pipeline.models.bundle import MOMENTS, Bundle
from pipeline.models.bundling import write_bundle
from pipeline.models.loading import RunModels
from pipeline.models.start import begin, load_start

WORKER = Path(__file__).parents[1] / "workers" / "begin.py"
VECTORS = {"student": "master", "teacher": "ema", **{moment: moment for moment in MOMENTS}}


@pytest.fixture(scope="module")
def bundle(trained_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "vit"
    write_bundle(trained_run, path)
    return path


def branch_of(config):
    backbone = build(config.model)
    return Branch(backbone, ProjectionHeads(backbone.feature_dim(backbone.grid.largest), config.heads))


def test_a_bundle_removes_nothing_that_it_did_not_make(trained_run, tmp_path):
    for name in (".mine.tmp", ".mine.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
    write_bundle(trained_run, tmp_path / "mine", moments=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.partial", ".mine.tmp", "mine"]
    assert all((tmp_path / name / "notes.txt").is_file() for name in (".mine.tmp", ".mine.partial"))


def test_a_bundle_holds_what_the_checkpoint_holds(trained_run, bundle, tmp_path, capsys):
    path, manifest = intact_checkpoint(trained_run / "checkpoints")
    for name, vector in VECTORS.items():
        there, here = load_named(path, manifest, vector), load_file(bundle / f"{name}.safetensors")
        assert there.keys() == here.keys()
        assert all(torch.equal(there[n], here[n]) for n in there)
    assert {name: len(center) for name, center in Bundle(bundle).centers().items()} == {
        f"{kind}.{head}": size for kind in ("cls", "patch") for head, size in enumerate((48, 64))
    }
    assert (
        main(["extract", str(trained_run), "--bundle", "--out", str(tmp_path / "slim"), "--no-moments", "--json"]) == 0
    )
    entry = json.loads(capsys.readouterr().out)
    assert (entry["step"], entry["largest"], entry["family"]) == (8, "64x4", "vit")
    assert not Bundle(tmp_path / "slim").has_moments
    assert main(["extract", str(trained_run), "--bundle", str(tmp_path / "slim")]) == 2
    assert main(["extract", str(trained_run), "--bundle"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: something is in the way")
    assert lines[1] == "error: no directory is named (--out): name one"


def test_a_damaged_bundle_is_refused(bundle, tmp_path):
    copied = shutil.copytree(bundle, tmp_path / "copied")
    content = bytearray((copied / "teacher.safetensors").read_bytes())
    content[-1] ^= 1
    (copied / "teacher.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"the bundle is damaged: teacher\.safetensors has another checksum"):
        Bundle(copied)
    whole = json.loads((copied / "bundle.json").read_text())
    for key, value, said in (
        ("family", 3, "family is 3"),
        ("optimizer_steps", "8", "optimizer_steps is '8'"),
        ("files", {}, "bundle.json has no checksum of centers.safetensors"),
    ):
        (copied / "bundle.json").write_text(json.dumps(whole | {key: value}))
        with pytest.raises(UserError, match=f"the bundle is damaged: {said}"):
            Bundle(copied)
    del whole["run"]
    (copied / "bundle.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="the bundle is damaged: KeyError: 'run'"):
        Bundle(copied)
    (copied / "bundle.json").write_text("{}")
    with pytest.raises(UserError, match="the bundle is damaged: KeyError"):
        Bundle(copied)


def test_weights_that_are_not_finite_are_no_beginning(trained_run, tmp_path):
    bundle = tmp_path / "bundle"
    write_bundle(trained_run, bundle, moments=False)
    weights = load_file(bundle / "teacher.safetensors")
    weights["backbone.norm.bias"][3] = float("nan")
    save_file(weights, bundle / "teacher.safetensors")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"]["teacher.safetensors"]["sha256"] = sha256(bundle / "teacher.safetensors")
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"norm\.bias is not finite \(model\.init_from="):
        load_start(build(Bundle(bundle).config.model), str(bundle))


def test_heads_that_come_along_do_not_make_the_backbone_wait(bundle, tmp_path):
    waits = [
        parse_config({"model": {"init_from": source}}).optim.head_warmup_epochs for source in (str(bundle), "timm_name")
    ]
    assert waits == [0, 1]


@pytest.mark.parametrize("family", ["vit", "eva", "swin", "resnet"])
def test_a_smaller_network_begins_as_the_sub_network_of_the_bundle(trained_runs, tmp_path, experiment, family):
    run = trained_runs(family)
    write_bundle(run, tmp_path / "bundle")
    tree = experiment(family)
    grid = Grid(parse_config(tree).model)
    smaller = grid.subnets[len(grid) // 2]
    depths = list(smaller.depths) if family == "resnet" else smaller.depths[2 if family == "swin" else 0]
    tree["model"] |= {
        "width": {"min": grid.widths[0], "max": smaller.width, "step": tree["model"]["width"]["step"]},
        "depth": {"min": depths, "max": depths, "step": 1},
    }
    if smaller.width == grid.widths[0]:
        tree["model"]["width"]["step"] = 32
    config = parse_config(tree)
    student = branch_of(config)
    begun = begin(student, str(tmp_path / "bundle"))
    assert begun.names == [name for name, _ in student.named_parameters()]
    assert not begun.complete  # moments are not cut
    for branch, backbone in (("student", student.backbone), ("teacher", build(config.model))):
        if branch == "teacher":
            assert load_start(backbone, str(tmp_path / "bundle")) == []
        size = config.model.image_size
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected = RunModels.open(run, branch).backbone(images, smaller)
            found = backbone(images)
        torch.testing.assert_close(found.cls, expected.cls, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.patches, expected.patches, rtol=0, atol=1e-5)


def test_what_does_not_fit_begins_fresh_and_is_listed(bundle, experiment, capsys):
    tree = experiment(heads={"prototypes": [48, 32, 16]}, model={"image_size": 48})
    tree["data"] |= {"global_crops": {"size": 48}, "local_crops": {"size": 24}}
    student = branch_of(parse_config(tree))
    fresh = {name: p.detach().clone() for name, p in student.named_parameters()}
    begun = begin(student, str(bundle))
    assert not begun.complete
    misfits = {"heads.heads.1.prototypes", *(name for name in fresh if name.startswith("heads.heads.2."))}
    assert set(begun.names) == fresh.keys() - misfits
    now, there = dict(student.named_parameters()), load_file(bundle / "student.safetensors")
    assert all(torch.equal(now[name], fresh[name]) for name in misfits)
    assert all(torch.equal(now[name], there[name]) for name in fresh.keys() - misfits - {"backbone.pos_embed"})
    assert now["backbone.pos_embed"].shape == (1, 37, 64)
    assert torch.equal(now["backbone.pos_embed"][:, 0], there["backbone.pos_embed"][:, 0])
    err = capsys.readouterr().err
    assert "note: begins fresh: heads.heads.1.prototypes is [64, 32] there and [32, 32] here" in err
    assert "note: begins fresh: and " in err


def test_what_cannot_fit_is_refused_in_one_line(bundle, experiment):
    with pytest.raises(UserError, match=r"holds a vit and the run trains a resnet .*: set model\.family=vit"):
        begin(branch_of(parse_config(experiment("resnet"))), str(bundle))
    tree = experiment()
    tree["model"] |= {"width": {"min": 32, "max": 128, "step": 16}}
    with pytest.raises(UserError, match=r"0% of the backbone fit: backbone\..*; its own is 64x4"):
        begin(branch_of(parse_config(tree)), str(bundle))


def test_ranks_begin_with_student_teacher_moments_and_centers(launch, bundle, experiment, tmp_path):
    """Two ranks at several layouts save at once what they began with: the bundle, bit for bit."""
    words = []
    engines = {"one": {"zero_stage": 1}, "three": {"zero_stage": 3}, "low": {"precision": "bf16"}}
    engines["fsdp2"] = {"backend": "fsdp2", "zero_stage": None, "precision": "bf16"}
    for name, engine in engines.items():
        tree = experiment(model={"init_from": str(bundle)}, engine=engine, data={"batch_size": 2})
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        words += [tmp_path / f"{name}.yaml", tmp_path / name]
    launch(WORKER, 2, *words)
    for name in engines:
        path = tmp_path / name / "step_00000000"
        manifest = read_manifest(path)
        assert manifest["optimizer_steps"] == 8
        for file, vector in VECTORS.items():
            there, here = load_file(bundle / f"{file}.safetensors"), load_named(path, manifest, vector)
            assert all(torch.equal(there[n], here[n]) for n in here), (name, file)
        shard = load_file(path / "shard_00000.safetensors")
        centers = Bundle(bundle).centers()
        assert all(torch.equal(shard[f"center.{n}"], center) for n, center in centers.items())
