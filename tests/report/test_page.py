"""The report of a run: charts that say what the numbers say, and a page that loads nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.report.charts import MAX_POINTS, Axes, line_chart, number, scatter_chart, split_bar, table, thinned
from pipeline.report.page import report

WORKER = Path(__file__).parents[1] / "workers" / "reported.py"


@pytest.fixture(scope="module")
def run_dir(launch, experiment, digits, tmp_path_factory) -> Path:
    """A run of six steps, evaluated and reported on, with a sample that was left out and a bad step added."""
    home = tmp_path_factory.mktemp("reported")
    val = f"{digits}/val-000000.tar"
    tree = experiment(
        loss={"ibot_start_epoch": 1},
        run={"max_steps": 6, "log_every_steps": 1},
        metrics={"port": 0, "health_every_steps": 2},
        eval={"every_steps": 3, "train": val, "val": val},
    )
    (home / "config.yaml").write_text(yaml.safe_dump(tree))
    launch(WORKER, 1, home / "config.yaml", home / "night", timeout=280)
    skip = {"key": "a<b", "shard": "x.tar", "reason": "truncated", "position": 7}
    (home / "night" / "skipped.jsonl").write_text(json.dumps(skip) + "\n")
    lines = (home / "night" / "metrics.jsonl").read_text().splitlines()
    bad = json.loads(lines[3]) | {"loss": float("nan"), "bad": ["dino/intact"]}
    lines[3] = json.dumps(bad)
    (home / "night" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return home / "night"


@pytest.mark.runs
def test_report_is_one_file_with_everything_in_it(run_dir):
    assert (run_dir / "report.html").stat().st_size > 20_000  # by the command
    page = report(run_dir)
    for title in ("Summary", "Losses", "Throughput", "Health", "Sub-networks", "Pictures", "Faults", "Environment"):
        assert re.search(f"<h2>{title}[^<]*</h2>", page)
    for chart in ("Total loss", "iBOT", "Throughput", "Effective rank", "k-NN accuracy during training", "GFLOPs"):
        assert re.search(f"<h3>[^<]*{chart}", page), chart
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "@import" not in page
    assert "<script" not in page


@pytest.mark.runs
def test_report_shows_what_changed_on_the_way(run_dir, tmp_path):
    assert "Changed on the way" not in report(run_dir)
    run = shutil.copytree(run_dir, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    first = manifest["settings"][0]
    later = {"values": first["values"] | {"optim.epochs": 77}, "courses": {"lr": [[[4, 0.5]], [[4, 0.5], [9, 0.25]]]}}
    manifest |= {"settings": [first, {"from_step": 3, **later}], "forked_from": {"run": "a<b", "step": 2}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    page = report(run)
    assert "<tr><td>3</td><td>optim.epochs</td><td>10</td><td>77</td></tr>" in page
    assert "<td>lr (laid out anew)</td><td>0.5 at step 4</td><td>0.5 at step 4, 0.25 at step 9</td>" in page
    assert "Began from step 2 of a&lt;b." in page


@pytest.mark.runs
def test_report_shows_faults_escaped(run_dir):
    page = report(run_dir)
    assert "a&lt;b of x.tar" in page
    assert "dino/intact" in page
    assert "not available" not in page.lower()


@pytest.mark.runs
def test_report_shows_crops_with_masks_and_components_of_three_sizes(run_dir):
    page = report(run_dir)
    pictures = re.findall(r"<img[^>]+src=\"data:image/png;base64,[A-Za-z0-9+/=]+\"", page)
    assert len(pictures) == 4 * (2 + 2) + 4 * (1 + 3)  # images x (global + local), images x (itself + sizes)
    for name in ("32x2", "48x3", "64x4"):
        assert f"<span>{name}</span>" in page


@pytest.mark.runs
def test_report_says_which_picture_is_missing_and_why(run_dir, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["train"] = str(tmp_path / "gone-{000000..000001}.tar")
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert "Not available: missing shard" in report(copy)
    assert "a picture is missing" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"starts": []}', '{"starts": 3, "data": 4, "versions": []}'])
def test_a_damaged_manifest_costs_the_report_no_more_than_what_it_says(run_dir, tmp_path, text, monkeypatch):
    monkeypatch.setattr("pipeline.report.page._pictures", lambda *_: "")
    shutil.copytree(run_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "copy" / "manifest.json").write_text(text)
    page = report(tmp_path / "copy")
    assert "unknown" in page
    assert "Total loss" in page


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "Not available: the file is damaged"),
        ("[]", "Not available: the file is damaged"),
        ('{"a": 1, "b": {"accuracy": null}}', "Not evaluated yet"),
        ('{"a\\n<b>": {"accuracy": 0.5, "params": 10, "gflops": 1}}', "a\\n&lt;b&gt;"),
        ('{"a": {"accuracy": NaN, "params": 0, "gflops": 1}}', "Not evaluated yet"),
    ],
)
def test_damaged_results_and_odd_names_are_shown_as_such(run_dir, tmp_path, text, part, monkeypatch):
    monkeypatch.setattr("pipeline.report.page._pictures", lambda *_: "")
    shutil.copytree(run_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "copy" / "eval" / "knn.json").write_text(text)
    assert part in report(tmp_path / "copy")


def test_lines_that_were_cut_short_leave_the_others(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.report.page._pictures", lambda *_: "")
    shutil.copytree(run_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    for name in ("metrics.jsonl", "skipped.jsonl"):
        path = tmp_path / "copy" / name
        path.write_text('{"step": 1}\n7\n{"position": 1, "reason": [1]}\n{"st{"step"\n' + path.read_text() + '{"ste')
    assert "a&lt;b of x.tar" in report(tmp_path / "copy")


@pytest.mark.runs
def test_a_run_without_records_is_refused(run_dir, tmp_path):
    copy = tmp_path / "young"
    shutil.copytree(run_dir, copy)
    (copy / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="recorded nothing"):
        report(copy)


def test_axes_map_the_ends_of_the_data_to_the_ends_of_the_drawing():
    axes = Axes([(0, 2.0), (10, 4.0)], "step")
    (left, bottom), (right, top) = axes.place(0, 2.0), axes.place(10, 4.0)
    assert axes.place(5, 3.0) == ((left + right) / 2, (bottom + top) / 2)
    assert left < right
    assert top < bottom
    assert Axes([(0, 2.0), (10, 4.0)], "step", floor_zero=True).place(0, 0.0)[1] == bottom
    assert Axes([(0, 2.0), (10, 4.0)], "step", least_span=4.0).place(0, 1.0)[1] == bottom
    log = Axes([(1, 0.0), (100, 1.0)], "parameters", log_x=True)
    assert log.place(10, 0.5) == ((left + right) / 2, (bottom + top) / 2)


def test_curves_leave_out_what_is_not_finite_and_vanish_if_nothing_is_left():
    chart = line_chart("loss", {"a": [(1, 1.0), (2, float("nan")), (3, 2.0)], "b": []})
    assert chart.count("<path") == 1
    assert "nan" not in chart
    assert line_chart("loss", {"a": [(1, float("inf"))]}) == ""


def test_long_curves_are_thinned_to_means():
    points = [(float(i), float(i % 2)) for i in range(10 * MAX_POINTS)]
    thin = thinned(points)
    assert len(thin) == MAX_POINTS
    assert all(y == 0.5 for _, y in thin)
    assert thinned(points[:5]) == points[:5]


def test_parts_add_up_to_the_whole_bar():
    widths = re.findall(r"width:([\d.]+)%", split_bar("time", {"a": 1.0, "b": 3.0}, "ms"))
    assert [float(w) for w in widths] == [25.0, 75.0]


def test_text_of_a_run_cannot_break_the_page():
    chart = scatter_chart("<x>", {"knn": [(1.0, 0.5, "<b>"), (2.0, 0.6, "c")]}, "x", "")
    assert "<b>:" not in chart
    assert "&lt;b&gt;" in chart
    assert "&lt;i&gt;" in table(["a"], [["<i>"]])


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (12345678, "12.35 M"), (25000, "25 k"), (0.00012, "1.2e-04"), (3.14159, "3.142")]
)
def test_numbers_are_written_for_people(value, text):
    assert number(value) == text
