"""The battery for a GPU: parts that fail alone, and the whole of it on small shapes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launcher import gpus, start_fork_server, start_ranks

from pipeline.bench.gpu import STAGES, battery
from pipeline.bench.gpu.battery import Part, parts, run, run_parts
from pipeline.bench.gpu.exact import Checks
from pipeline.bench.gpu.stage import Stage
from pipeline.bench.gpu.training import make_shards
from pipeline.errors import UserError

ROOT = Path(__file__).parents[3]
RUN_MODULE = ROOT / "tests" / "workers" / "run_module.py"

NO_DALI = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "nvidia.dali":
            raise ImportError("it is not here")

sys.meta_path.insert(0, Refuse())
"""


def program(name, text, seconds=60.0):
    return Part("a", name, seconds, [sys.executable, "-c", text])


def test_a_part_that_crashes_or_hangs_ends_alone(tmp_path):
    child = tmp_path / "child"
    hang = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
pathlib.Path({str(child)!r}).write_text(str(child.pid))
time.sleep(1000)
"""
    said = f'import pathlib; pathlib.Path({str(tmp_path / "last.json")!r}).write_text(\'{{"lines": ["all | well"]}}\')'
    outcomes = run_parts(
        [
            program("crash", "import os; print('last words', flush=True); os.abort()"),
            program("hang", hang, seconds=5.0),
            program("last", said),
        ],
        tmp_path,
    )
    assert [o.outcome for o in outcomes] == ["failed (exit code -6)", "killed after 5 s", "done"]
    assert outcomes[0].lines == ["last words"]
    if child.exists():  # it had been started: it ended with its parent
        deadline = time.monotonic() + 60
        while alive(int(child.read_text())):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    table = (tmp_path / "summary.md").read_text().splitlines()[-3:]
    assert [row.split(" | ")[1:3] for row in table] == [
        ["crash", "failed (exit code -6)"],
        ["hang", "killed after 5 s"],
        ["last", "done"],
    ]
    assert table[2].endswith(r" | all \| well |")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_parts_of_an_earlier_call_stay_in_the_summary(tmp_path):
    run_parts([program("one", "raise SystemExit(3)"), program("two", "")], tmp_path)
    run_parts([program("one", "")], tmp_path)
    found = {entry["name"]: entry["outcome"] for entry in json.loads((tmp_path / "report.json").read_text())["parts"]}
    assert found == {"one": "done", "two": "done"}


def test_limits_leave_a_call_of_either_half_below_ten_minutes(tmp_path):
    for stages in ("abc", "de"):
        assert sum(part.seconds for part in parts(tmp_path, list(stages), tiny=False)) < 600
    assert {part.stage for part in parts(tmp_path, list(STAGES), tiny=False)} == set(STAGES)


def test_wrong_stages_and_a_missing_gpu_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no stage 'x'"):
        run(tmp_path, ["a", "x"], tiny=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="add --tiny"):
        run(tmp_path, [], tiny=False)


def test_a_kernel_beyond_its_limit_fails_the_check(tmp_path):
    checks = Checks(Stage("exact", tmp_path, time.monotonic() + 600, tiny=True))
    right = torch.arange(1.0, 5, dtype=torch.float64)
    checks.compare("right", right.float(), right, 1e-5)
    checks.compare("off", right.float() * 1.001, right, 1e-5)
    checks.compare("unwritten", right.float() * torch.nan, right, 1e-5)
    checks.run("crash", lambda _: torch.zeros(2) @ torch.zeros(3))
    assert [wrong.split()[0] for wrong in checks.wrong] == ["off", "unwritten", "crash:"]
    assert checks.errors["off"] == pytest.approx(1e-3, rel=1e-3)


class Fork:
    """In place of `Popen`: what a part runs, by a fork of a process that has imported already what parts import."""

    def __init__(self, command, *, stdout, stderr, env, start_new_session):
        assert command[:2] == [sys.executable, "-m"]
        assert (stderr, start_new_session) == (subprocess.STDOUT, True)
        log = Path(stdout.name)
        environment = log.with_suffix(".environment")
        environment.write_text(json.dumps(env))
        (self._process,) = start_ranks(RUN_MODULE, [str(environment), *command[2:]], log.parent, [log])
        self.pid = self._process.pid

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_battery_runs_on_small_shapes(tmp_path, monkeypatch):
    """The command from a checkout by PYTHONPATH alone, with the first stage; its other parts share their imports."""
    command = [sys.executable, "-m", "pipeline.bench", "gpu", "a", "--tiny", "--out", str(tmp_path / "report")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if not gpus():  # forks would not see them
        start_fork_server()
        monkeypatch.setattr(battery, "Popen", Fork)
    assert battery.run(tmp_path / "report", ["b", "c", "d", "e"], tiny=True) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [entry["outcome"] for entry in report["parts"]] == ["done"] * 10
    said = {entry["name"]: " ".join(entry["lines"]) for entry in report["parts"]}
    assert "comparisons, 0 wrong" in said["exact"]
    assert "64x4: " in said["step"]
    assert "plain eager: " in said["step"]
    assert "fsdp2-keep: " in said["engines"]
    table = (tmp_path / "report" / "engines.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0] for row in table] == ["| zero1", "| fsdp2-keep", "| fsdp2-reshard"]
    assert "10 steps, loss " in said["training"]
    assert "losses differ by 0.00% at first" in said["training_eager"]
    summary = (tmp_path / "report" / "summary.md").read_text()
    assert summary.startswith(f"# {report['machine']['card']}, {report['date']}\n")
    assert f"torch {torch.__version__.split('+')[0]}" in summary


@pytest.mark.slow
def test_training_goes_on_with_tensors_where_dali_is_missing(tmp_path):
    make_shards(Stage("shards", tmp_path, time.monotonic() + 600, tiny=True))
    (tmp_path / "sitecustomize.py").write_text(NO_DALI)
    command = [sys.executable, "-m", "pipeline.bench.gpu.stage", "training", str(tmp_path), "600", "--tiny"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["lines"][0] == "no DALI (ImportError: it is not here): tensors in place of pictures"
    assert found["lines"][1].startswith("10 steps, loss ")
