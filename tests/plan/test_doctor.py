"""The doctor finds what it is asked to find, says what to do, and fails only where the job would."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.data.shards import build
from pipeline.engine import distributed
from pipeline.plan.check import Check
from pipeline.plan.check_data import check_images, check_shards
from pipeline.plan.check_directory import check_disk, check_lead
from pipeline.plan.check_machine import OLDEST_DRIVER, check_device, check_driver, check_memory
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
    names = ["software", "driver", "device", "memory", "shards", "images", "run directory", "disk", "signal lead"]
    assert [check["name"] for check in checks] == [*names, "kernels", "clocks", "network", "all-reduce"]
    assert {check["status"] for check in checks} <= {"pass", "warn"}


@pytest.mark.parametrize(
    ("ranks", "host_gib", "status"), [(8, 64, "pass"), (8, 5, "warn"), (8, 4, "fail"), (16, 4, "pass")]
)
def test_offloaded_state_of_a_nodes_ranks_is_held_against_the_host(ranks, host_gib, status, monkeypatch):
    """Masters, moments and EMA of a ViT-L are 5.4 GiB; 16 ranks have half of them on each of two nodes."""
    config = load_config(ROOT / "yaml" / "vit_large.yaml", ["engine.offload_optimizer=cpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1 << 10, "SC_PHYS_PAGES": host_gib << 20}.get)
    check = check_memory(config, ranks)
    assert check.status == status
    assert check.fix == ("" if status == "pass" else "use more GPUs in all, or set engine.offload_optimizer=null")


@pytest.mark.parametrize(
    ("offload", "host_gib", "status"), [("cpu", 30, "warn"), ("null", 30, "warn"), ("cpu", 36, "pass")]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_offloading_leaves_the_state_in_the_same_memory(offload, host_gib, status, monkeypatch):
    """A rank of a ViT-L wants 31.7 GiB in all, wherever its state lies."""
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
    assert main(["doctor", str(path), "optim.layer_decay=0.5"]) == 1
    assert "optim.layer_decay is 0.9 there and 0.5 here" in capsys.readouterr().out


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
    from pipeline.data.reader import Dataset

    dataset = Dataset(str(shard))
    start, size = map(int, dataset._rows[0, :2])  # the first record is among those looked at
    with open(shard, "r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    found = check_images(config)
    assert found.status == "warn"
    assert dataset.key(0) in found.finding


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
