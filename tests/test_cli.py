"""The command from outside: help, exit codes, one clear line for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main


@pytest.fixture
def refused(capsys):
    """Run a command that the user got wrong; returns its one line."""

    def run(*argv):
        assert main([str(word) for word in argv]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err + out
        return lines[0]

    return run


@pytest.fixture
def config(tmp_path, experiment):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(experiment(run={"dir": str(tmp_path / "run"), "max_steps": 1})))
    return path


def test_misspelt_key(refused, config):
    line = refused("train", config, "optim.base_lrr=1", "--dry-run")
    assert "optim.base_lrr" in line
    assert "did you mean 'optim.base_lr'" in line


def test_unknown_option_and_unknown_command(refused, config):
    assert "--dry-run" in refused("train", config, "--dry-ru")
    assert "poa" in refused("trian", config)


def test_overrides_may_stand_behind_options(capsys, config):
    assert main(["train", str(config), "--dry-run", "optim.base_lr=0.125"]) == 0
    assert "base_lr: 0.125" in capsys.readouterr().out


def test_missing_shard_names_the_shard(refused, config):
    assert "train-000003.tar" in refused("train", config, "data.train=none/train-{000003..000004}.tar")


def test_run_directory_of_another_config(refused, config, tmp_path):
    (tmp_path / "run").mkdir()
    other = yaml.safe_load(config.read_text())
    other["optim"]["layer_decay"] = 0.7
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(other))
    line = refused("train", config)
    assert "optim.layer_decay is 0.7 there and 0.9 here" in line
    (tmp_path / "run" / "config.yaml").write_text("][")
    assert "not YAML" in refused("train", config)


def test_a_file_in_the_way_of_the_run_directory(refused, config, tmp_path):
    (tmp_path / "run").write_text("")
    assert str(tmp_path / "run") in refused("train", config)


def test_fewer_images_than_a_global_batch(refused, config, digits):
    line = refused("train", config, f"data.train={digits}/train-000002.tar", "data.batch_size=5000")
    assert "fewer than a global batch of 5000" in line


def test_eager_kernels_are_not_chosen_in_silence_on_a_cpu(refused, config):
    assert "engine.kernels=eager" in refused("train", config, "engine.kernels=triton")


def test_impossible_subnet_names_the_nearest(refused, trained_run, tmp_path):
    line = refused("extract", trained_run, "--subnet", "40x3", "--out", tmp_path / "out")
    assert "48x3" in line
    assert not (tmp_path / "out").exists()


def test_directory_that_is_no_run(refused, tmp_path):
    assert str(tmp_path) in refused("extract", tmp_path, "--all", "--out", tmp_path / "out")
    assert str(tmp_path / "none") in refused("subnets", tmp_path / "none")


def test_empty_folder_of_images(refused, tmp_path):
    (tmp_path / "images").mkdir()
    assert str(tmp_path / "images") in refused("shards", "build", tmp_path / "images", tmp_path / "shards")


def test_subnets_as_json_has_the_contracts_keys(capsys, config):
    assert main(["subnets", str(config), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 9
    assert set(rows[0]) == {"name", "width", "depths", "params", "gflops", "multiplicity"}
    assert (rows[0]["name"], rows[-1]["name"]) == ("32x2", "64x4")


def test_dry_run_shows_config_grid_and_memory_and_leaves_nothing(capsys, config, tmp_path):
    assert main(["train", str(config), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in ("base_lr: 0.05", "64x4", "full", "parameters", "memory of one rank", "GiB"):
        assert part in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["eval", "knn", "--help"]])
def test_help_imports_nothing_heavy(argv):
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'nvidia', 'timm', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
