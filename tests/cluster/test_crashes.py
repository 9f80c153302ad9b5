"""A rank that crashes or hangs ends the whole run, and the log says which one it was and where."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.watchdog import Heartbeat, find_stopped

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "workers" / "run_with_fault.py"


@pytest.fixture
def run(experiment, tmp_path):
    """Run two ranks under torchrun with a fault in one; gives the exit code, the log, and the seconds from start."""

    def start(fault: str, rank: int, hang_timeout: float = 300) -> tuple[int, str, float]:
        tree = experiment(run={"dir": str(tmp_path / "run"), "max_steps": 6, "hang_timeout_seconds": hang_timeout})
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        result = subprocess.run(
            [*torchrun, str(WORKER), str(tmp_path / "config.yaml"), fault, str(rank), "3"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        ended = time.time()
        steps = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime  # when the last good step was logged
        return result.returncode, result.stderr, ended - steps

    return start


@pytest.mark.parametrize("rank", [0, 1])
def test_traceback_of_the_crashed_rank_comes_first_and_the_others_end(run, rank):
    code, log, seconds = run("crash", rank)
    assert code == 1
    assert seconds < 60  # and not after the 300 that a hang may last
    first = re.search(r"^.*(Traceback|error:).*$", log, re.MULTILINE)
    assert first[0] == f"error: rank {rank} of 2 crashed"
    assert "ZeroDivisionError: the fault of this test" in log
    assert log.index("ZeroDivisionError") < log.find("lost another rank") or "lost another rank" not in log


def test_rank_that_falls_asleep_is_named_with_phase_and_stack(run):
    code, log, _ = run("fall_asleep", 1, hang_timeout=60)
    assert code == 1
    assert re.search(r"error: rank 1 of 2 hangs: \d+ s in teacher of step 3", log)
    assert "in fall_asleep" in log[log.index("rank 1 of 2 hangs") :]


def test_rank_whose_native_code_holds_the_interpreter_is_named_by_the_others(run):
    code, log, _ = run("hold_the_interpreter", 1, hang_timeout=60)
    assert code == 1
    assert re.search(r"error: rank 1 of 2 \(.*\) stopped: last seen \d+ s ago in ", log)
    assert "Last known stack of rank 1:" in log


def beat(rank: int, beats: int, written: float, stack: str = "in all_reduce, torch/distributed/c10d.py") -> Heartbeat:
    return Heartbeat(rank, "host", 100 + rank, beats, "data of step 7", 30.0, written, stack)


def test_rank_with_the_fewest_beats_is_the_one_that_stopped():
    hearts = [beat(0, 41, 1000.0), beat(1, 38, 999.0), beat(2, 41, 998.5)]
    assert [h.rank for h in find_stopped(hearts, 5.0)] == [1]


def test_heartbeat_that_nobody_writes_any_more_goes_before_few_beats():
    hearts = [beat(0, 41, 1000.0), beat(1, 38, 999.0), beat(2, 41, 900.0)]
    assert [h.rank for h in find_stopped(hearts, 5.0)] == [2]


def test_among_equals_the_rank_outside_of_a_collective_is_the_one_that_stopped():
    hearts = [beat(0, 41, 1000.0), beat(1, 41, 999.0, stack="in read, loader.py"), beat(2, 41, 999.0)]
    assert [h.rank for h in find_stopped(hearts, 5.0)] == [1]


def test_no_rank_is_blamed_when_all_wait():
    assert find_stopped([beat(0, 41, 1000.0), beat(1, 41, 999.0)], 5.0) == []
