"""Extraction: every sub-network as a plain timm model, with a proof that fails when it should."""

import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipeline import load_subnet
from pipeline.cli import main
from pipeline.commands import extract as command_module
from pipeline.elastic import cost
from pipeline.errors import UserError
from pipeline.models import extract as extraction
from pipeline.models.extract import PROOF_IMAGES, extract
from pipeline.models.loading import RunModels, run_config
from pipeline.models.proof import TOLERANCE, ProofFailed, load_proof_images

ROOT = Path(__file__).parents[2]
WRITE_RUN = ROOT / "tests" / "workers" / "write_run.py"
OTHER_FAMILIES = {
    "swin": {
        "family": "swin",
        "image_size": 64,
        "patch_size": 4,
        "head_dim": 8,
        "window_size": 4,
        "width": {"min": 16, "max": 32, "step": 8},
        "depth": {"min": 2, "max": 4, "step": 2},
    },
    "resnet": {
        "family": "resnet",
        "image_size": 64,
        "patch_size": 4,
        "width": {"min": 32, "max": 64, "step": 32},
        "depth": {"min": [1, 1, 1, 1], "max": [1, 2, 2, 1], "step": 1},
    },
}


def command(*words: object) -> int:
    parser = ArgumentParser()
    command_module.add_arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    return command_module.run(args)


def proof_of(directory: Path) -> dict:
    return json.loads((directory / "proof.json").read_text())


@pytest.fixture(scope="module")
def everything(trained_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models")
    extract(trained_run, "all", out)
    return out


def test_every_subnetwork_of_the_grid_is_extracted_and_proven(trained_run, everything):
    config = run_config(trained_run)
    grid = RunModels.open(trained_run).grid
    assert sorted(path.name for path in everything.iterdir()) == sorted(subnet.name for subnet in grid.subnets)
    for subnet in grid.subnets:
        proof = proof_of(everything / subnet.name)
        assert 0 <= proof["max_abs_difference"] <= TOLERANCE == proof["tolerance"]
        assert (proof["subnet"], proof["branch"], proof["step"], proof["images"]) == (
            subnet.name,
            "teacher",
            8,
            PROOF_IMAGES,
        )
        model = timm.create_model(f"local-dir:{everything / subnet.name}", pretrained=True)
        assert sum(p.numel() for p in model.parameters()) == cost.params(config.model, subnet)


@pytest.fixture(scope="module")
def other_runs(experiment, labelled, launch, tmp_path_factory) -> dict[str, Path]:
    """Run directories of a Swin and a ResNet with random weights; every sub-network is extracted to `out` beside it."""
    directory = tmp_path_factory.mktemp("others")
    for family, model in OTHER_FAMILIES.items():
        tree = experiment(data={**labelled, "global_crops": {"size": 64}, "local_crops": {"count": 2, "size": 32}})
        (directory / f"{family}.yaml").write_text(yaml.safe_dump({**tree, "model": model}))
    launch(WRITE_RUN, 1, *(directory / f"{family}.yaml" for family in OTHER_FAMILIES))
    return {family: directory / family for family in OTHER_FAMILIES}


def test_swin_and_resnet_are_extracted_and_proven(other_runs):
    for run in other_runs.values():
        results = extract(run, "all", run.parent / "out", proof_images=4)
        assert len(results) == len(RunModels.open(run).grid)
        assert all(r.max_abs_difference <= TOLERANCE for r in results)
        small = timm.create_model(f"local-dir:{results[0].path}", pretrained=True).eval()
        assert small(torch.zeros(1, 3, 96, 96)).shape == (1, small.num_features)  # another size than in training


def test_a_process_that_never_heard_of_this_project_computes_the_same_features(trained_run, other_runs, tmp_path):
    directories = []
    for run in (trained_run, *other_runs.values()):
        config, models = run_config(run), RunModels.open(run)
        (result,) = extract(run, [models.grid.smallest], tmp_path / models.config.model.family, proof_images=1)
        images = load_proof_images(config, config.data.val, 8).images
        with torch.inference_mode():
            features = models.backbone(images, models.grid.smallest).cls.contiguous()
        save_file({"images": images, "features": features}, result.path / "expected.safetensors")
        directories.append(str(result.path))
    script = tmp_path / "stranger.py"
    script.write_text(
        """
import sys
class Unknown:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("pipeline", "kernels"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Unknown())
for name in ("pipeline", "kernels"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit("the project is within reach")
import timm, torch
from safetensors.torch import load_file
for path in sys.argv[1:]:
    expected = load_file(path + "/expected.safetensors")
    model = timm.create_model("local-dir:" + path, pretrained=True).eval()
    data = timm.data.resolve_data_config(model.pretrained_cfg)
    assert tuple(data["input_size"]) == expected["images"].shape[1:], data
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406) and tuple(data["std"]) == (0.229, 0.224, 0.225), data
    assert data["interpolation"] == "bicubic", data
    with torch.inference_mode():
        print((model(expected["images"]) - expected["features"]).abs().max().item())
"""
    )
    process = subprocess.run(
        [sys.executable, str(script), *directories],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    differences = [float(line) for line in process.stdout.split()]
    assert len(differences) == 3
    assert all(difference <= TOLERANCE for difference in differences)


def test_an_extracted_model_can_be_fine_tuned_at_another_size(everything):
    path = everything / "48x3"
    model = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=7, img_size=64)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    assert torch.equal(model.state_dict()["norm.weight"], load_file(path / "model.safetensors")["norm.weight"])
    plain = timm.create_model(f"local-dir:{path}", pretrained=True)
    assert plain(torch.zeros(2, 3, 16, 48)).shape == (2, 48)


@pytest.mark.parametrize("change", [1.01, float("nan")])
def test_tampered_weights_fail_the_proof_and_leave_nothing(trained_run, tmp_path, monkeypatch, capsys, change):
    def tampered(tensors, path, metadata):
        tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"] * change
        save_file(tensors, path, metadata)

    monkeypatch.setattr(extraction, "save_tensors", tampered)
    with pytest.raises(ProofFailed, match="32x2 differs"):
        extract(trained_run, ["32x2"], tmp_path / "out")
    assert command(trained_run, "--subnet", "32x2", "--out", tmp_path / "out") == 1
    assert "differs from the sub-network in place" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # it was made for this


def test_command_prints_path_and_how_to_load_it(trained_run, tmp_path, capsys):
    assert command(trained_run, "--subnet", "32x2", "--subnet", "48x3", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/32x2" in out
    assert f"{tmp_path}/48x3" in out
    loaded: dict = {}
    exec(out[out.index("import timm") :], loaded)
    assert loaded["model"].num_features == 32


def test_command_shows_progress_of_a_whole_grid_and_prints_json(trained_run, tmp_path, capsys):
    assert command(trained_run, "--all", "--out", tmp_path, "--proof-images", "1", "--json") == 0
    printed = capsys.readouterr()
    entries = json.loads(printed.out)
    assert len(entries) == len(RunModels.open(trained_run).grid)
    assert set(entries[0]) == {"name", "path", "max_abs_difference", "params", "gflops"}
    assert "9/9" in printed.err


def test_impossible_subnetwork_names_the_nearest(trained_run, tmp_path):
    with pytest.raises(UserError, match=r"no sub-network '40x2'.*32x2, 48x2"):
        extract(trained_run, ["32x2", "40x2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_empty_and_untrained_run_directories_are_user_errors(trained_run, tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        extract(tmp_path / "nowhere", "all", tmp_path / "out")
    with pytest.raises(UserError, match="holds no run"):
        extract(tmp_path, "all", tmp_path / "out")
    shutil.copy(trained_run / "config.yaml", tmp_path)
    with pytest.raises(UserError, match="no intact checkpoint"):
        extract(tmp_path, "all", tmp_path / "out")


def test_a_config_of_another_model_is_a_user_error(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    config = yaml.safe_load((trained_run / "config.yaml").read_text())
    config["model"]["depth"]["max"] = 5
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"another model than config\.yaml"):
        extract(tmp_path / "run", "all", tmp_path / "out")


def test_something_else_in_the_way_is_left_alone(trained_run, tmp_path):
    (tmp_path / "32x2").mkdir()
    (tmp_path / "32x2" / "thesis.txt").write_text("only copy")
    with pytest.raises(UserError, match=r"something else is in the way.*32x2"):
        extract(trained_run, ["48x2", "32x2"], tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["32x2", "thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use the directory"):
        extract(trained_run, ["32x2"], tmp_path / "file")


def test_extracting_again_replaces_the_same_model_only(trained_run, tmp_path):
    extract(trained_run, ["32x2"], tmp_path)
    (tmp_path / "32x2" / "model.safetensors").unlink()
    extract(trained_run, ["32x2"], tmp_path)
    assert load_subnet(tmp_path / "32x2").num_features == 32
    with pytest.raises(UserError, match="in the way"):
        extract(trained_run, ["32x2"], tmp_path, branch="student")


def test_what_its_owner_put_beside_a_model_stays(trained_run, tmp_path):
    extract(trained_run, ["32x2"], tmp_path)
    (tmp_path / "32x2" / "model.onnx").write_text("mine")
    (tmp_path / ".32x2.tmp").mkdir()
    (tmp_path / ".32x2.tmp" / "notes").write_text("mine too")
    extract(trained_run, ["32x2"], tmp_path)
    assert (tmp_path / "32x2" / "model.onnx").read_text() == "mine"
    assert [path.name for path in (tmp_path / ".32x2.tmp").iterdir()] == ["notes"]
    assert load_subnet(tmp_path / "32x2").num_features == 32


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_a_model_that_another_command_put_there_meanwhile_is_replaced_only_if_it_is_the_same(
    trained_run, tmp_path, monkeypatch, branch
):
    (faster,) = extract(trained_run, ["32x2"], tmp_path / "faster", branch)
    out = tmp_path / "out"

    def meanwhile(models, subnet, aside, images):
        shutil.copytree(faster.path, out / "32x2")
        return largest_difference(models, subnet, aside, images)

    largest_difference = extraction.largest_difference
    monkeypatch.setattr(extraction, "largest_difference", meanwhile)
    with nullcontext() if branch == "teacher" else pytest.raises(UserError, match="in the way"):
        extract(trained_run, ["32x2"], out)
    assert [path.name for path in out.iterdir()] == ["32x2"]
    assert proof_of(out / "32x2")["branch"] == branch


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_a_file_that_its_owner_changed_is_not_replaced(trained_run, tmp_path, name):
    extract(trained_run, ["32x2"], tmp_path)
    (tmp_path / "32x2" / name).write_text("fine-tuned")
    with pytest.raises(UserError, match=f"changed since.*{name}"):
        extract(trained_run, ["32x2"], tmp_path)
    assert (tmp_path / "32x2" / name).read_text() == "fine-tuned"


def test_all_files_of_a_model_follow_the_umask(trained_run, tmp_path):
    before = os.umask(0o027)
    try:
        extract(trained_run, ["32x2"], tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "32x2").iterdir()} == {0o640}


def test_shards_that_are_not_found_from_here_name_the_option_and_the_place(trained_run, tmp_path, monkeypatch):
    shutil.copytree(trained_run, tmp_path / "run")
    config = yaml.safe_load((trained_run / "config.yaml").read_text())
    config["data"]["val"] = "shards/val-000.tar"
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"shards/val-000.tar.*{tmp_path}.*--proof-shards"):
        extract("run", ["32x2"], "out")


@pytest.mark.parametrize(
    "text", ["[]", '{"32x2": 3}', '{"32x2": {"accuracy": "high", "step": 8, "branch": "teacher"}}']
)
def test_accuracies_that_are_none_are_passed_over(trained_run, tmp_path, text):
    shutil.copytree(trained_run, tmp_path / "run")
    (tmp_path / "run" / "eval").mkdir(exist_ok=True)
    (tmp_path / "run" / "eval" / "knn.json").write_text(text)
    if text == "[]":
        with pytest.raises(UserError, match=r"knn\.json.*remove it"):
            extract(tmp_path / "run", ["32x2"], tmp_path / "out")
    else:
        extract(tmp_path / "run", ["32x2"], tmp_path / "out")


def test_a_full_disk_is_noticed_before_anything_is_written(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UserError, match=r"9 models take 0\.\d+ GB and 1e-06 GB are free"):
        extract(trained_run, "all", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_becomes_full_meanwhile_leaves_nothing_and_names_the_file(
    trained_run, tmp_path, little_room, capsys
):
    for words, file in (
        (("--subnet", "32x2", "--out"), "32x2/model.safetensors"),
        (("--bundle",), None),
    ):
        out = tmp_path / "new" / "out"
        with little_room(4096):
            assert main(["extract", str(trained_run), *words, str(out)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "File too large" in err
        assert f"({out / file if file else out})" in err
        assert not any(tmp_path.iterdir())


def test_loaded_from_a_run_equals_loaded_from_its_extraction(trained_run, everything):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        from_directory = load_subnet(everything / "48x3")(x)
        assert torch.equal(load_subnet(trained_run, "48x3")(x), from_directory)
        assert not torch.equal(load_subnet(trained_run, "48x3", branch="student")(x), from_directory)
        assert load_subnet(trained_run)(x).shape == (2, 64)
    with pytest.raises(UserError, match="no branch"):
        load_subnet(trained_run, "48x3", branch="pupil")
    with pytest.raises(UserError, match="asked for 32x2"):
        load_subnet(everything / "48x3", "32x2")


def test_a_damaged_model_directory_is_a_user_error(everything, tmp_path):
    shutil.copytree(everything / "32x2", tmp_path / "32x2")
    (tmp_path / "32x2" / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(UserError, match="timm cannot load the model"):
        load_subnet(tmp_path / "32x2")


def test_proof_skips_unusable_images_and_says_so(trained_run, odd, tmp_path):
    extract(trained_run, ["32x2"], tmp_path, proof_images=50, proof_shards=str(odd / "images-000000.tar"))
    proof = proof_of(tmp_path / "32x2")
    assert proof["skipped_images"] > 0
    assert 0 < proof["images"] < 50
    assert proof["shards"] == ["images-000000.tar"]


def test_missing_proof_shards_are_a_user_error(trained_run, tmp_path, capsys):
    with pytest.raises(UserError, match="missing shard"):
        extract(trained_run, ["32x2"], tmp_path, proof_shards="nowhere-{000..003}.tar")
    for count in ("0", "-1", "1e3", "1_0", "9" * 30):
        words = ["extract", str(trained_run), "--subnet", "32x2", "--out", str(tmp_path), f"--proof-images={count}"]
        assert main(words) == 2
        assert "--proof-images" in capsys.readouterr().err


def test_parsing_the_commands_loads_nothing_heavy():
    code = (
        "import sys, argparse, pipeline, pipeline.commands.extract as e, pipeline.commands.eval as v\n"
        "e.add_arguments(argparse.ArgumentParser()); v.add_arguments(argparse.ArgumentParser())\n"
        "print([m for m in ('torch', 'timm', 'sklearn', 'deepspeed', 'nvidia.dali') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == "[]", out.stderr
