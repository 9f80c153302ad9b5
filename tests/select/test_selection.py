"""`poa select` as a whole, on a run of nine networks and a rival: what it prints, keeps and refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
from timm.models import save_for_hf

from pipeline.cli import main
from pipeline.elastic import Grid, Subnet
from pipeline.models.loading import RunModels, run_config
from pipeline.select import selection as selecting
from pipeline.select import times
from pipeline.select.latency import Machine, Timing
from pipeline.select.sources import open_sources
from pipeline.select.times import design


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory) -> Path:
    return shutil.copytree(trained_run, tmp_path_factory.mktemp("chosen") / "run")


@pytest.fixture(scope="module")
def rival(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rivals") / "resnet10t"
    save_for_hf(timm.create_model("resnet10t", num_classes=0, pretrained_cfg_overlay={"input_size": (3, 32, 32)}), path)
    return path


@pytest.fixture
def steady(monkeypatch):
    """Timings that follow from the size of a network, so that no clock decides a test; a list of what was timed."""
    timed: list[str] = []

    def time_modules(modules, machine: Machine) -> dict[str, Timing]:
        timed.extend(modules)
        seconds = {n: 1e-3 + 1e-8 * sum(p.numel() for p in m.parameters()) for n, (m, _) in modules.items()}
        return {name: Timing(value, value, value, 5) for name, value in seconds.items()}

    monkeypatch.setattr(times, "time_modules", time_modules)
    return timed


def answer(capsys, *words: object) -> dict:
    assert main(["select", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_best_that_fits_is_chosen_among_all_and_rivals_stand_beside(run, rival, labelled, steady, capsys, tmp_path):
    shards = ("--train", *labelled["train"], "--val", *labelled["val"])
    found = answer(capsys, run, rival, *shards, "--label-free", "--images", 40, "--out", tmp_path / "page.html")
    networks = {n["name"]: n for n in found["networks"]}
    grid = Grid(run_config(run).model)
    assert set(networks) == {*(subnet.name for subnet in grid.subnets), "resnet10t"}
    assert found["quality"] == "knn"
    best = max(n["quality"]["knn"] for n in networks.values())
    assert networks[found["best"]]["quality"]["knn"] == best
    assert found["best"] in found["front"]
    kept = json.loads((run / "eval" / "knn.json").read_text())
    assert {name: kept[name]["accuracy"] for name in kept} == {n: networks[n]["quality"]["knn"] for n in kept}
    assert set(found["rank_correlation"]) == {"agreement", "rank", "loss"}
    assert all(c["networks"] == 9 for c in found["rank_correlation"].values())
    assert networks["64x4"]["quality"]["agreement"] == 1.0
    assert "agreement" not in networks["resnet10t"]["quality"]
    models = RunModels.open(run)
    assert networks["48x3"]["params"] == models.params(Subnet(48, (3,)))
    assert networks["48x3"]["memory"] == 4 * networks["48x3"]["params"] + networks["48x3"]["activations"]
    assert found["prediction_error"]["networks"] >= 3
    assert {"32x2", "32x4", "48x3", "64x2", "64x4", "resnet10t"} < set(steady)
    assert found["prediction_error"]["largest"] < 0.2  # these times are a line in the parameters, not in the FLOPs
    page = (tmp_path / "page.html").read_text()
    for part in ("20-NN accuracy over cost", "Scores without labels", "over latency", "resnet10t", "48x3"):
        assert part in page
    assert not re.findall(r'(?:src|href)="', page)
    assert "<script" not in page
    assert page.count('<path d="M') >= 4  # staircases and diamonds


def test_evaluations_that_are_kept_are_not_made_again(run, labelled, steady, capsys, monkeypatch):
    shards = ("--train", *labelled["train"], "--val", *labelled["val"])
    first = answer(capsys, run, *shards)
    monkeypatch.setattr("pipeline.evaluate.evaluation.extract_features", lambda *_, **__: pytest.fail("computed again"))
    assert answer(capsys, run, *shards) == first


def test_best_alone_is_a_name_and_nothing_is_timed_without_a_limit_on_time(run, steady, capsys):
    assert main(["select", str(run), "--best", "--max-params", "40K"]) == 0
    name = capsys.readouterr().out
    models = RunModels.open(run)
    assert models.params(models.grid.parse(name.strip())) <= 40_000
    assert name.count("\n") == 1
    assert steady == []
    assert main(["select", str(run), "--best", "--json", "--max-params", "40K"]) == 0
    assert json.loads(capsys.readouterr().out) == {"best": name.strip()}


def test_the_choice_is_told_even_if_its_page_cannot_be_written(run, steady, capsys, tmp_path, little_room):
    with little_room(4096):
        page = ["--out", str(tmp_path / "page.html")]
        assert main(["select", str(run), "--best", "--quality", "loss", "--max-params", "40K", *page]) == 2
    out, err = capsys.readouterr()
    assert RunModels.open(run).grid.parse(out.strip())
    assert "page.html" in err
    assert not any(tmp_path.iterdir())


def test_a_limit_on_time_is_kept_by_what_was_measured(run, steady, capsys):
    models = RunModels.open(run)
    sizes = sorted(models.params(subnet) for subnet in models.grid.subnets)
    limit = 1e3 * (1e-3 + 1e-8 * sizes[4]) + 1e-9
    found = answer(capsys, run, "--max-ms", f"{limit:.9f}")
    best = next(n for n in found["networks"] if n["name"] == found["best"])
    assert best["name"] in steady
    assert best["ms"] <= limit
    dearer = [n for n in found["networks"] if n["params"] > sizes[6]]
    assert all(
        "knn" not in n["quality"] or n["name"] in json.loads((run / "eval" / "knn.json").read_text()) for n in dearer
    )


def test_without_labels_the_teacher_decides(run, labelled, steady, capsys, monkeypatch):
    monkeypatch.setattr(selecting, "_has_labels", lambda shards: False)
    found = answer(capsys, run, "--images", 32)
    assert (found["quality"], found["best"]) == ("agreement", "64x4")
    assert "no labels" in found["about"]
    assert found["rank_correlation"] == {}
    assert main(["select", str(run), "--images", "32"]) == 0
    out = capsys.readouterr().out
    assert "agreement with the teacher" in out
    assert "best: 64x4" in out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--max-params", "1K"), ("--max-params 0.001 M is the tightest", "32x2", "allow")),
        (("--max-ms", "0.5", "--max-params", "1M"), ("--max-ms 0.5 ms is the tightest", "32x2")),
        (("--max-gflops", "-1"), ("--max-gflops",)),
        (("--max-memory", "many"), ("--max-memory",)),
        (("--quality", "rank", "RIVAL"), ("says nothing of a model outside of the run", "resnet10t")),
        (("RUN",), ("two networks are called",)),
        (("--out", "/proc/x.html"), ("/proc",)),
    ],
)
def test_what_cannot_be_answered_is_one_line(run, rival, steady, capsys, words, parts):
    words = [str({"RIVAL": rival, "RUN": run}.get(word, word)) for word in words]
    paths = [word for word in words if word.startswith("/") and Path(word).is_dir()]
    assert main(["select", str(run), *paths, *(word for word in words if word not in paths)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in line


def test_the_corners_and_the_middle_of_a_grid_are_timed_first(run):
    assert [s.name for s in design(Grid(run_config(run).model))] == ["32x2", "32x4", "48x3", "64x2", "64x4"]


def test_a_model_that_is_called_like_a_network_of_the_run_bears_its_folders_name(run, rival, tmp_path):
    twin = shutil.copytree(rival, tmp_path / "older" / "48x3")
    machine = Machine("cpu", 1)
    names = [name for source in open_sources([twin, run], "teacher", machine) for name in source.networks]
    assert names[-1] == "older/48x3"
    assert len(names) == 10
    runs = open_sources([run, shutil.copytree(run, tmp_path / "second")], "teacher", machine)
    assert [next(iter(source.networks)) for source in runs] == ["run/32x2", "second/32x2"]
