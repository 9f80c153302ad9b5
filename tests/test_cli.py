"""The command from outside: help, exit codes, one clear line for every mistake."""

import json
import os
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
    assert "did you mean --pixels?" in refused("eval", "knn", config, "--pixel")
    assert "did you mean --per-shard?" in refused("shards", "build", config, config, "--pershard")
    assert "see `poa report --help`" in refused("report", config, "--nothing-like-it")
    assert "poa" in refused("trian", config)


def test_overrides_may_stand_behind_options(capsys, config):
    assert main(["train", str(config), "--dry-run", "optim.base_lr=0.125"]) == 0
    assert "base_lr: 0.125" in capsys.readouterr().out


def test_the_run_directory_is_taken_as_it_is(capsys, config):
    for name in ("try #1", "2024", "no", "a: b"):
        for words in (["--run-dir", name], [f"run.dir={name}"]):
            assert main(["train", str(config), "--dry-run", *words]) == 0
            assert yaml.safe_load(capsys.readouterr().out.split("\n\n")[0])["run"]["dir"] == name


def test_an_option_given_twice_is_refused(refused, config):
    for words in (["train", config, "--run-dir", "a", "--run-dir", "b"], ["plan", config, "--gpus", 1, "--gpus=2"]):
        assert f"{words[2]} is given twice (command line): give it once" in refused(*words)
    line = refused("eval", "knn", config, "--train", "a.tar", "--val", "c.tar", "--train", "b.tar")
    assert "--train is given twice (command line): give it once, with all its values behind it" in line


def test_an_option_that_would_be_ignored_is_refused(refused, config):
    for words in (["--onnx"], ["--branch", "student"], ["--proof-images", 8], ["--proof-shards", "a.tar"]):
        assert f"{words[0]} means nothing for a bundle" in refused("extract", config, "--bundle", "b", *words)
    line = refused("extract", config, "--all", "--out", "m", "--no-moments")
    assert "--no-moments means nothing for a model (command line): leave it out, or use --bundle" in line


def test_braces_that_the_shell_filled_in_are_refused(refused, config):
    line = refused("train", config, "--dry-run", "data.train=t-000.tar", "data.train=t-001.tar")
    assert "data.train is given twice" in line
    assert "quote" in line


@pytest.mark.parametrize(
    "words",
    [
        ("report", "RUN", "--out", "TMP/none/x.html"),
        ("report", "RUN", "--out", "TMP"),
        ("report", "RUN", "--out", "/dev/null"),
        ("report", "RUN", "--out", "s3://bucket/report.html"),
        ("train", "CONFIG", "--run-dir", "s3://bucket/run"),
        ("shards", "build", "TMP", "s3://bucket/shards"),
        ("report", "RUN", "--out", "/proc/x.html"),
        ("extract", "RUN", "--subnet", "32x2", "--out", "/proc/models"),
        ("extract", "RUN", "--subnet", "32x2", "--out="),
        ("extract", "RUN", "--subnet", "32x2", "--out=$NOT_SET_HERE/models"),
        ("report", "x" * 300),
        ("subnets", "TMP/none"),
        ("subnets", "RUN/manifest.json/x"),
        ("plan", "CONFIG", "--gpus", "1_0"),
        ("plan", "CONFIG", "--gpus", "9" * 40),
        ("plan", "CONFIG", "--gpus", "8", "--mfu", "nan"),
        ("doctor", "CONFIG", "--gpus", "0"),
        ("watch", "RUN", "--port", "70000"),
        ("watch", "RUN", "--prometheus", "prom.cluster"),
    ],
)
def test_what_cannot_be_used_is_one_line(refused, trained_run, config, tmp_path, words):
    names = {"RUN": str(trained_run), "TMP": str(tmp_path), "CONFIG": str(config)}
    for name, path in names.items():
        words = [word.replace(name, path) for word in words]
    refused(*words)


def test_an_error_of_the_system_names_its_file_or_the_place_in_the_code(monkeypatch, capsys):
    def fail(error):
        def run(args):
            raise error

        return run

    for error, parts in (
        (OSError(28, "No space left on device", "a/b"), ("No space left on device (a/b)", "make room")),
        (OSError(5, "Input/output error"), ("Input/output error", "test_cli.py, line")),
        (OSError("a library's words"), ("a library's words",)),
    ):
        monkeypatch.setattr("pipeline.commands.subnets.run", fail(error))
        assert main(["subnets", "x"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert all(part in err for part in parts)


def test_a_package_that_does_not_load_is_one_line_with_what_to_install(monkeypatch, capsys):
    for name, text, parts in (
        ("nvidia.nvimgcodec", "No module named 'nvidia.nvimgcodec'", ("(nvidia.nvimgcodec): pip install", "codec-cu1")),
        (
            "nvidia.dali.backend_impl",
            "libx.so.1: cannot open\nit",
            ("libx.so.1: cannot open\\nit", "'nvidia-dali-cuda1"),
        ),
        ("huggingface_hub.errors", "cannot import name 'X'", ("'huggingface_hub>=",)),
        ("torch._C", "no", ("'torch<", "(torch._C)")),  # and not torchvision
        ("PIL._imaging", "no", ("(PIL._imaging): install this package again",)),
        (None, "a library's words", ("a library's words (", "test_cli.py, line")),
    ):

        def run(args, text=text, name=name):
            raise ImportError(text, name=name)

        monkeypatch.setattr("pipeline.commands.subnets.run", run)
        assert main(["subnets", "x"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: a package cannot be loaded: ")
        assert err.count("\n") == 1
        assert all(part in err for part in parts), err


@pytest.mark.parametrize("error", [KeyError("none"), ImportError("no such name", name="pipeline.files")], ids=type)
def test_an_error_of_our_own_keeps_its_traceback(monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr("pipeline.commands.subnets.run", run)
    with pytest.raises(type(error)):
        main(["subnets", "x"])


def test_modules_of_the_working_directory_do_not_stand_in(tmp_path):
    for name in ("select", "json", "yaml", "torch", "kernels"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pipeline", "subnets", str(root / "yaml" / "vit_large.yaml")]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_output_that_nobody_reads_or_nothing_holds():
    root = Path(__file__).parent.parent
    poa = f"'{sys.executable}' -P -m pipeline subnets yaml/vit_large.yaml"
    for redirection, code in (("| head -n 1 >/dev/null", 0), (">/dev/full", 2), (">&-", 0)):
        shell = f"set -o pipefail; {poa} {redirection}"
        done = subprocess.run(["bash", "-c", shell], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert ("No space left on device (standard output)" in done.stderr) == (code == 2)


def test_a_working_directory_that_is_gone_is_one_line(refused, config, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working directory cannot be used: No such file or directory" in refused("subnets", config)


def test_missing_shard_names_the_shard(refused, config):
    assert "train-000003.tar" in refused("train", config, "data.train=none/train-{000003..000004}.tar")


def test_run_directory_of_another_config(refused, config, tmp_path):
    (tmp_path / "run").mkdir()
    other = yaml.safe_load(config.read_text())
    other["heads"]["hidden_dim"] = 96
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(other))
    line = refused("train", config)
    assert "heads.hidden_dim is 96 there and 64 here" in line
    (tmp_path / "run" / "config.yaml").write_text("][")
    assert "not YAML" in refused("train", config)


def test_a_file_in_the_way_of_the_run_directory(refused, config, tmp_path):
    (tmp_path / "run").write_text("")
    assert str(tmp_path / "run") in refused("train", config)


def test_fewer_images_than_a_global_batch(refused, config, digits):
    line = refused("train", config, f"data.train={digits}/train-000002.tar", "data.batch_size=5000")
    assert "fewer than a global batch of 5000" in line
    line = refused("train", config, "data.lanes=50", "data.batch_size=4")
    assert "50 lanes are more than the 4 images of a global batch (data.lanes): set it to" in line


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


def test_commands_that_compute_nothing_import_no_torch():
    rooms = "data.shards, pipeline.data.check, pipeline.plan.plan, pipeline.plan.subnets, pipeline.models.publish"
    code = f"import sys, pipeline.{rooms}\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_a_slip_in_the_name_of_a_shard_is_told_before_what_training_imports(config, tmp_path):
    words = ["train", str(config), f"data.train={tmp_path}/train-{{000000..000001}}.tar", f"run.dir={tmp_path}/new"]
    code = (
        f"import sys\nfrom pipeline.cli import main\nassert main({words!r}) == 2\n"
        "sys.exit('torch' in sys.modules and 'torch is imported')"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "missing shard (2 of 2 shards missing)" in done.stderr
    assert not (tmp_path / "new").exists()
