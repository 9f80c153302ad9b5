"""The benchmarks of the pipeline run on real steps and give figures that fit together."""

import json

import pytest
import yaml

from pipeline.bench import __main__ as bench


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command on a tree and give its JSON object, or its exit code and stderr if it fails."""

    def go(what, tree, *words):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        monkeypatch.setattr("sys.argv", ["bench", what, str(path), *words])
        code = bench.main()
        out, err = capsys.readouterr()
        return json.loads(out) if code == 0 else (code, err)

    return go


def test_phases_of_a_step_add_up(run, experiment):
    result = run("step", experiment("vit"), "--steps", "3", "--warmup", "1")
    assert result["global_batch"] == 4
    assert result["images_per_second"] == pytest.approx(4 / result["step_seconds"]["median"])
    assert {"teacher", "intact", "elastic", "backward"} <= set(result["phase_seconds"])
    slowest = 3 * result["step_seconds"]["quartile_3"]
    assert 0 < sum(result["phase_seconds"].values()) < 2 * slowest


def test_both_layouts_of_a_resnet_are_timed(run, experiment):
    result = run("layout", experiment("resnet"), "--steps", "2", "--warmup", "1")
    for size in ("smallest", "largest"):
        seconds = result[size]["seconds"]
        assert result[size]["channels_last_speedup"] == pytest.approx(seconds["contiguous"] / seconds["channels_last"])
    assert result["largest"]["seconds"]["contiguous"] > 0


def test_a_family_without_convolutions_is_refused(run, experiment):
    code, err = run("layout", experiment("vit"))
    assert code == 2
    assert err.startswith("error: a vit has one convolution")


@pytest.mark.runs
def test_starts_are_timed_and_imports_counted_by_package(run, experiment):
    result = run("start", experiment("vit", metrics={"port": 0}), "--rounds", "1")
    assert result["cpu_seconds"]["min"] == result["cpu_seconds"]["median"] == result["cpu_seconds"]["max"] > 0
    assert list(result["import_seconds"].values()) == sorted(result["import_seconds"].values(), reverse=True)
    assert {"torch", "timm", "deepspeed", "nvidia"} <= set(result["import_seconds"])


@pytest.mark.runs
def test_a_start_that_fails_is_reported_with_its_reason(run, experiment, tmp_path):
    code, err = run("start", experiment("vit", data={"train": str(tmp_path / "nothing-000000.tar")}), "--rounds", "1")
    assert code == 2
    assert err.startswith("error: a start failed (")
    assert "nothing-000000.tar" in err


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["bench", "gpu", "a", "--tiny", "--out", str(tmp_path / "file" / "report")])
    assert bench.main() == 2
    assert capsys.readouterr().err.startswith(f"error: Not a directory ({tmp_path / 'file' / 'report'}): check")
