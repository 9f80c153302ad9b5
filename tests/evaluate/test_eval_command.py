"""`poa eval`: results of a run and of directories, on screen and on disk."""

import json
import shutil
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from shapes import write_masked

from pipeline.commands import eval
from pipeline.errors import UserError
from pipeline.evaluate.embed import Wanted, embed
from pipeline.evaluate.evaluation import Request, evaluate
from pipeline.evaluate.table import table
from pipeline.models.extract import extract
from pipeline.models.loading import RunModels, run_config
from pipeline.report.page import report
from pipeline.run.step import build_student
from pipeline.select.latency import machine_here
from pipeline.select.sources import open_sources


def command(*words: object) -> int:
    parser = ArgumentParser()
    eval.add_arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    return eval.run(args)


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "run")


def test_results_of_a_run_are_printed_and_kept_in_it(run, labelled, capsys):
    assert command("knn", run, "--subnets", "32x2,64x4", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((run / "eval" / "knn.json").read_text())
    assert list(results) == ["32x2", "64x4"]
    for name, entry in results.items():
        assert 0 < entry["accuracy"] <= entry["top5"] <= 1
        assert entry["skipped"] == {"train": {}, "val": {}}
        assert (entry["step"], entry["branch"], entry["train"]) == (8, "teacher", labelled["train"])
        assert entry["params"] == RunModels.open(run).params(RunModels.open(run).grid.parse(name))


def test_trained_and_untrained_and_pixels_stand_side_by_side(run, labelled, capsys):
    assert command("knn", run, "--subnets", "48x3", "--untrained", "--pixels") == 0
    shown = capsys.readouterr().out
    entry = json.loads((run / "eval" / "knn.json").read_text())["48x3"]
    for key in ("accuracy", "top5", "untrained_accuracy", "pixels_accuracy"):
        assert f" {100 * entry[key]:.1f}" in shown
    assert "untrained %" in shown
    assert "pixels" in shown
    assert f"{entry['train_images']} training and {entry['val_images']} validation images" in shown
    assert list(json.loads((run / "eval" / "knn.json").read_text())) == ["48x3"]


def test_untrained_is_the_network_that_the_run_began_with(run):
    config = run_config(run)
    expected = build_student(config).backbone.state_dict()
    found = RunModels.untrained(config).backbone.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_earlier_results_stay_while_checkpoint_and_data_are_the_same(run, labelled):
    evaluate(Request(run, subnets=["32x2"]))
    evaluate(Request(run, subnets=["64x4"]))
    path = run / "eval" / "knn.json"
    assert list(json.loads(path.read_text())) == ["32x2", "64x4"]
    evaluate(Request(run, subnets=["48x3"], branch="student"))
    assert list(json.loads(path.read_text())) == ["48x3"]
    evaluate(Request(run, subnets=["48x2"], branch="student", train=labelled["val"]))
    assert list(json.loads(path.read_text())) == ["48x2"]


def test_accuracy_reaches_the_model_card_of_the_same_branch_only(run, tmp_path):
    accuracy = evaluate(Request(run, subnets=["32x2"]))["32x2"]["accuracy"]
    card = (extract(run, ["32x2"], tmp_path / "teacher")[0].path / "README.md").read_text()
    assert f"{100 * accuracy:.1f}%" in card
    card = (extract(run, ["32x2"], tmp_path / "student", branch="student")[0].path / "README.md").read_text()
    assert "not measured" in card


def test_an_extracted_directory_gives_what_the_run_gives(run, labelled, tmp_path, capsys):
    expected = evaluate(Request(run, subnets=["48x3"]))["48x3"]
    path = extract(run, ["48x3"], tmp_path / "models")[0].path
    shards = ("--train", *labelled["train"], "--val", *labelled["val"])
    assert command("knn", path, *shards, "--json") == 0
    found = json.loads(capsys.readouterr().out)["48x3"]
    assert (found["accuracy"], found["top5"]) == (expected["accuracy"], expected["top5"])
    assert not (path / "eval").exists()
    assert command("linear", path, *shards) == 0
    assert "linear %" in capsys.readouterr().out


def test_mistakes_are_user_errors(run, labelled, tmp_path):
    with pytest.raises(UserError, match="no such run directory and no model"):
        evaluate(Request(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no run and no model"):
        evaluate(Request(tmp_path))
    with pytest.raises(UserError, match="no sub-network '40x2'"):
        evaluate(Request(run, subnets=["40x2"]))
    with pytest.raises(UserError, match="no sub-network is named"):
        evaluate(Request(run, subnets=[]))
    with pytest.raises(UserError, match="missing shard"):
        evaluate(Request(run, val="nowhere.tar"))
    path = extract(run, ["32x2"], tmp_path / "models")[0].path
    with pytest.raises(UserError, match="no train shards are named"):
        evaluate(Request(path))
    for ignored in ({"subnets": ["32x2"]}, {"branch": "student"}):
        with pytest.raises(UserError, match=r"one model, not a run.*--branch"):
            evaluate(Request(path, train=labelled["train"], val=labelled["val"], **ignored))
    with pytest.raises(UserError, match=r"one model, not a run.*--branch"):
        embed(Wanted(path, labelled["val"], tmp_path / "features", branch="teacher"))
    with pytest.raises(UserError, match=r"models have no branches \(--branch\)"):
        open_sources([path], "teacher", machine_here("cpu", 1, "fp32", 1))


def test_table_names_what_was_left_out():
    entry = {"accuracy": 0.5, "train_images": 7, "val_images": 3, "params": 2e6, "gflops": 1.25}
    shown = table({"32x2": {**entry, "skipped": {"train": {"truncated": 2}, "val": {}}}}, "linear")
    assert shown.splitlines()[1].split() == ["32x2", "2.00", "1.25", "50.0"]
    assert "left out: 2 truncated in train" in shown


def test_results_are_printed_even_if_they_cannot_be_kept(run, capsys):
    (run / "eval" / "knn.json").mkdir(parents=True)
    assert command("knn", run, "--subnets", "32x2") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].startswith("32x2")
    assert "warning: the results are not kept in" in shown.err


def test_file_of_results_that_holds_something_else_is_written_anew(run, capsys):
    path = run / "eval" / "knn.json"
    path.parent.mkdir(exist_ok=True)
    for content, said in (('{"32x2": {"accur', "written anew"), ("[1]", "written anew"), ('{"48x2": 3}', "48x2")):
        path.write_text(content)
        evaluate(Request(run, subnets=["32x2"]))
        assert list(json.loads(path.read_text())) == ["32x2"]
        assert said in capsys.readouterr().err


def test_missing_class_names_on_one_side_are_told_once(run, labelled, tmp_path, capsys):
    shards = [Path(shutil.copy(shard, tmp_path)) for shard in labelled["train"]]
    (tmp_path / "classes.txt").write_text("".join(f"{i}\n" for i in range(99)))
    bare = tmp_path / "bare"
    bare.mkdir()
    val = shutil.copy(labelled["val"][0], bare)
    evaluate(Request(run, subnets=["32x2"], train=[str(path) for path in shards], val=str(val)))
    assert capsys.readouterr().err.count("compared by number, not by name") == 1


def test_segmentation_of_a_run_is_printed_and_kept_and_stands_on_card_and_page(run, labelled, tmp_path, capsys):
    write_masked(labelled["val"], tmp_path / "masked")
    (masked,) = (tmp_path / "masked").glob("*.tar")
    words = ("segment", run, "--train", masked, "--val", masked, "--subnets", "32x2", "--untrained")
    assert command(*words, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((run / "eval" / "segment.json").read_text())
    entry = results["32x2"]
    assert list(entry["iou"]) == ["background", "disc", "square", "triangle"]
    for key in ("accuracy", "miou", "knn_accuracy", "knn_miou", "untrained_miou", "untrained_knn_miou"):
        assert 0 < entry[key] < 1
    shown = table(results, "segment")
    assert shown.splitlines()[1].split()[0] == "32x2"
    assert f"{100 * entry['miou']:.1f}" in shown
    card = (extract(run, ["32x2"], tmp_path / "models")[0].path / "README.md").read_text()
    assert f"segmentation: mIoU {100 * entry['miou']:.1f}% (linear)" in card
    assert f"`poa eval segment RUN --train {masked} --val {masked} --subnets 32x2`" in card
    assert f"<td>{100 * entry['miou']:.1f}%</td>" in report(run)
