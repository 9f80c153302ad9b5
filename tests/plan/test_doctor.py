"""The doctor finds what it is asked to find, says what to do, and fails only where the job would."""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.data import tars
from pipeline.data.reader import Dataset
from pipeline.data.shards import build
from pipeline.engine import distributed
from pipeline.errors import UserError
from pipeline.plan.check import Check
from pipeline.plan.check_data import check_images, check_shards
from pipeline.plan.check_directory import check_directory, check_disk, check_lead
from pipeline.plan.check_machine import OLDEST_DRIVER, check_device, check_driver, check_memory
from pipeline.plan.check_names import check_evaluation, check_metrics, check_pretrained
from pipeline.plan.check_ranks import check_collectives
from pipeline.plan.doctor import table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(experiment, tmp_path) -> Callable:
    """Write a config with these sections and give its path."""

    def make(**sections):
        sections.setdefault("run", {}).setdefault("dir", str(tmp_path / "run"))
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(experiment(**sections)))
        return path

    return make


def test_sound_experiment_passes(write, capsys):
    assert main(["doctor", str(write()), "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    names = ["software", "driver", "device", "memory", "caches"]
    names += ["shards", "sources", "images", "evaluation", "pretrained", "metrics"]
    names += ["run directory", "disk", "signal lead", "kernels", "clocks", "network", "all-reduce"]
    assert [check["name"] for check in checks] == names
    assert {check["status"] for check in checks} <= {"pass", "warn"}


def test_what_ends_a_check_is_its_failure_and_the_others_go_on(write, capsys, monkeypatch):
    """A wheel that does not load, and an error that nobody thought of; of a collective check, too."""

    def broken(*_):
        raise RuntimeError("two\nlines")

    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    monkeypatch.setattr("pipeline.plan.doctor.check_store", broken)
    monkeypatch.setattr("torch.distributed.all_reduce", broken)
    assert main(["doctor", str(write()), "--json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    failed = {name for name, check in checks.items() if check["status"] == "fail"}
    assert failed == {"software", "images", "store", "all-reduce"}
    for name in ("software", "images"):
        assert "(nvidia.nvimgcodec)" in checks[name]["finding"]
        assert "'nvidia-nvimgcodec-cu1" in checks[name]["fix"]
    assert re.fullmatch(r"RuntimeError: two lines \(.*test_doctor\.py, line \d+\)", checks["store"]["finding"])
    assert checks["all-reduce"]["finding"].endswith(": RuntimeError: two lines")


@pytest.mark.parametrize(
    ("ranks", "host_gib", "status"), [(8, 64, "pass"), (8, 11, "warn"), (8, 9, "fail"), (16, 8, "pass")]
)
def test_offloaded_state_of_a_nodes_ranks_is_held_against_the_host(ranks, host_gib, status, monkeypatch):
    """Masters, moments and EMA of a ViT-L are 5.4 GiB, and as much the snapshot of a checkpoint; 16 ranks have half of
    them on each of two nodes."""
    config = load_config(ROOT / "yaml" / "vit_large.yaml", ["engine.offload_optimizer=cpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1 << 10, "SC_PHYS_PAGES": host_gib << 20}.get)
    check = check_memory(config, ranks)
    assert check.status == status
    assert check.fix == ("" if status == "pass" else "use more GPUs in all, or set engine.offload_optimizer=null")


@pytest.mark.parametrize(
    ("offload", "host_gib", "status"), [("cpu", 40, "warn"), ("null", 40, "warn"), ("cpu", 44, "pass")]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_offloading_leaves_the_state_in_the_same_memory(offload, host_gib, status, monkeypatch):
    """A rank of a ViT-L wants 39.2 GiB in all, wherever its state lies; a tenth more passes."""
    config = load_config(ROOT / "yaml" / "vit_large.yaml", [f"engine.offload_optimizer={offload}"])
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1 << 10, "SC_PHYS_PAGES": host_gib << 20}.get)
    assert check_memory(config, 1).status == status


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bf16_on_a_cpu_is_warned_of_as_long_as_pytorch_sums_in_bf16(write):
    check = check_device(load_config(write(engine={"precision": "bf16"})))
    assert (check.status, check.fix) == ("warn", "to train on CPUs set engine.precision=fp32")
    bias = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    torch.nn.functional.layer_norm(
        torch.randn(4096, 8).bfloat16(), (8,), torch.ones(8).bfloat16(), bias
    ).sum().backward()
    assert bias.grad.max() < 4096, "PyTorch sums in fp32 now: drop the warning"


@pytest.mark.slow
def test_a_compiler_that_is_missing_fails_before_the_job_does(write, tmp_path):
    path = write(engine={"compile": True})
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "pipeline", "doctor", str(path), "--json"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (check,) = [check for check in json.loads(done.stdout) if check["name"] == "kernels"]
    assert check["status"] == "fail"
    assert "no-compiler" in check["finding"]
    assert "engine.compile=false" in check["fix"]


# what NVIDIA's two kernel modules write
PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Aug 19 01:15:15 UTC 2023\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U22-I3)  Tue Jul 22\n"
GCC = "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"


@pytest.mark.parametrize("text", [PROPRIETARY, OPEN])
def test_driver_is_named_and_one_too_old_for_the_dali_wheel_fails(text, tmp_path):
    loaded = tmp_path / "version"
    loaded.write_text(text.format("999.65.06") + GCC)
    assert check_driver(loaded) == Check("driver", "pass", "NVIDIA 999.65.06")
    loaded.write_text(text.format("470.57.02") + GCC)  # older than either wheel wants
    old = check_driver(loaded)
    assert old.status == "fail"
    assert old.finding.startswith("NVIDIA 470.57.02; nvidia-dali-cuda")


def test_no_driver_is_said_plainly(tmp_path):
    assert check_driver(tmp_path / "version") == Check("driver", "pass", "no NVIDIA driver on this machine")


def test_dali_is_held_against_the_drivers_that_setup_chooses_it_by():
    (wheels,) = re.findall(r"^DALI_WHEELS = ({.*})", (ROOT / "setup.py").read_text(), re.MULTILINE)
    chosen_by = {f"nvidia-dali-{wheel}": oldest for wheel, oldest in ast.literal_eval(wheels).items()}
    assert chosen_by == OLDEST_DRIVER


def test_missing_shards_fail_with_the_way_out_and_the_other_checks_go_on(write, capsys):
    assert main(["doctor", str(write()), "data.train=nowhere/train-{000..003}.tar"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (place,) = (i for i, line in enumerate(lines) if line.startswith("fail  shards"))
    assert "nowhere/train-000.tar" in lines[place]
    assert lines[place + 1].strip().startswith("-> ")
    assert any(line.startswith("pass  all-reduce") for line in lines)


def test_run_directory_of_another_experiment_fails(write, tmp_path, capsys):
    path = write()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(path.read_text())
    assert main(["doctor", str(path)]) == 0
    assert main(["doctor", str(path), "heads.hidden_dim=96"]) == 1
    assert "heads.hidden_dim is 64 there and 96 here" in capsys.readouterr().out


def test_shards_of_the_evaluation_are_looked_at(write, digits, capsys):
    val = f"{digits}/val-000000.tar"
    assert check_evaluation(load_config(write(eval={"every_steps": 2, "train": val, "val": val}))).status == "pass"
    assert check_evaluation(load_config(write(eval={"every_steps": 2}))).status == "fail"  # as training refuses
    for name in ("eval.train", "eval.val", "data.val"):
        overrides = [f"{name}=missing.tar"]
        later = check_evaluation(load_config(write(), overrides))
        assert (later.status, "missing.tar" in later.finding, name in later.finding) == ("warn", True, True)
        online = {"every_steps": 2, **({"val": val} if name == "eval.train" else {})}
        now = check_evaluation(load_config(write(eval=online), overrides))
        assert (now.status, "missing.tar" in now.finding) == ("fail", True)


@pytest.mark.parametrize(
    ("metrics", "status", "part"),
    [
        ({}, "pass", "19400"),
        ({"host": "203.0.113.1"}, "warn", "203.0.113.1"),
        ({"host": "a..b"}, "warn", "a..b"),
        ({"cert_file": "none.pem", "key_file": "none.pem"}, "fail", "none.pem"),
        ({"cert_file": "setup.py", "key_file": "setup.py"}, "fail", "cert_file"),
        ({"cert_file": "setup.py", "key_file": "setup.py", "client_ca_file": "none"}, "fail", "client_ca_file"),
    ],
)
def test_what_the_metrics_name_is_looked_at(write, metrics, status, part, monkeypatch):
    monkeypatch.chdir(ROOT)
    check = check_metrics(load_config(write(metrics=metrics)))
    assert (check.status, part in check.finding) == (status, True)


def test_a_package_that_training_would_miss_is_missed_by_the_doctor(write, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for key, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        with pytest.raises(UserError, match=rf"{key} is not installed \(metrics.{key}\): pip install {package}"):
            check_metrics(load_config(write(metrics={key: "project"})))


@pytest.mark.parametrize("key", ["metrics.targets_dir", "run.dir"])
@pytest.mark.parametrize("place", ["/proc/self/x", "setup.py", "setup.py/x"])
def test_a_directory_that_cannot_be_made_fails(write, key, place, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["doctor", str(write()), f"{key}={place}"]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"^fail  {'metrics' if key.startswith('metrics') else 'run directory'} ", out, re.MULTILINE)
    assert key in out


def test_weights_to_start_from_are_tried(write, tmp_path):
    assert check_pretrained(load_config(write())).status == "pass"
    with pytest.raises(UserError, match=r"model\.init_from"):
        check_pretrained(load_config(write(), [f"model.init_from={tmp_path}", "optim.head_warmup_epochs=1"]))


def test_a_run_that_another_batch_or_other_shards_would_break_fails(write, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    config = load_config(trained_run / "config.yaml", run_dir=str(tmp_path / "run"))
    assert check_directory(config, 1).finding.endswith("resumes from step_00000008")
    with pytest.raises(UserError, match="global batch was 4 images and would be 8"):
        check_directory(config, 2)
    for text in ("{", '{"settings": [{"from_step": 0}]}'):  # what training refuses
        (tmp_path / "run" / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"damaged.*manifest\.json"):
            check_directory(config, 1)


def test_more_ranks_than_images_fail_and_more_than_shards_warn(write):
    config = load_config(write())
    assert check_shards(config, 2).status == "pass"
    assert check_shards(config, 100).status == "warn"
    assert check_shards(config, 1000).status == "fail"


def test_images_that_cannot_be_decoded_are_named(write, tmp_path):
    build("sklearn:digits", tmp_path / "shards", per_shard=2000, progress=False)
    shard = tmp_path / "shards" / "train-000000.tar"
    config = load_config(write(data={"train": str(shard)}))
    assert check_images(config).status == "pass"
    dataset = Dataset(str(shard))
    image = tars.walk(shard)[0].image  # the first record is among those looked at
    with open(shard, "r+b") as file:
        file.seek(image.offset)
        file.write(bytes(image.size))
    found = check_images(config)
    assert found.status == "warn"
    assert dataset.key(0) in found.finding


def test_what_evaluation_during_training_would_refuse_fails_before_the_job_does(write, digits, tmp_path):
    def examine(val):
        return check_shards(load_config(write(eval={"every_steps": 2, "val": val})), 1)

    assert examine(f"{digits}/val-000000.tar").status == "pass"
    with pytest.raises(UserError, match="nothing to evaluate on"):
        examine(None)
    with pytest.raises(UserError, match="missing shard"):
        examine(f"{digits}/val-000009.tar")
    for name in ("val-000000.tar", "val-000000.idx"):
        shutil.copy(digits / name, tmp_path)
    (tmp_path / "classes.txt").write_text("ten\n")
    with pytest.raises(UserError, match=r"1 of 1 classes .*: ten"):
        examine(f"{tmp_path}/val-000000.tar")


def test_picture_that_training_sees_differently_is_named(write, tmp_path):
    picture = Image.fromarray((np.arange(40 * 60 * 3).reshape(40, 60, 3) % 251).astype(np.uint8))
    buffer = io.BytesIO()
    picture.convert("CMYK").save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    at = jpeg.index(b"\xff\xee")  # Adobe's marker, by which decoders know that CMYK is stored inverted
    data = jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4]) :]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    check = check_images(load_config(write(data={"train": str(tmp_path / "a.tar")})))
    assert check.status == "fail"
    assert "0 of 1 images are sound; a of" in check.finding
    assert check.finding.endswith("pixels")


def test_disk_too_small_for_the_retained_checkpoints_fails(write, tmp_path):
    target = tmp_path / "small"
    target.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(target)], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system here")
    try:
        config = load_config(write(run={"dir": str(target / "run"), "keep": 2}))  # 3 x 3.6 MiB
        assert check_disk(config).status == "pass"
        assert check_disk(load_config(write(run={"dir": str(target / "run"), "keep": 6}))).status == "warn"
        assert check_disk(load_config(write(run={"dir": str(target / "run"), "keep": 20}))).status == "fail"
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_lead_shorter_than_two_saves_warns(write):
    assert check_lead(load_config(write()), 1).status == "pass"
    short = check_lead(load_config(write(checkpoint={"signal_lead_seconds": 1e-9})), 1)
    assert short.status == "warn"
    assert "--signal=USR1@" in short.fix


def test_wrong_sum_of_an_all_reduce_fails(monkeypatch):
    ranks = distributed.initialize(60)
    try:
        assert check_collectives(ranks, 1).status == "pass"
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(1))
        assert check_collectives(ranks, 1).status == "fail"
    finally:
        distributed.shut_down()


def test_table_has_a_fix_below_its_line_and_a_count():
    text = table([Check("a", "pass", "fine"), Check("b", "fail", "broken", "mend it")])
    assert text.splitlines() == [
        "pass  a             fine",
        "fail  b             broken",
        "                    -> mend it",
        "1 pass, 0 warn, 1 fail",
    ]
