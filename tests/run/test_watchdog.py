"""A rank that crashes or hangs ends the whole run, and the log says which one it was and where."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from pipeline.engine import flight
from pipeline.run.watchdog import Heartbeat, Watchdog, find_stopped, read_heartbeats

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "workers" / "run_with_fault.py"
FORKED = ROOT / "tests" / "workers" / "forked_torchrun.py"
WATCHED = ROOT / "tests" / "workers" / "watched.py"


class Ended(NamedTuple):
    """What became of two ranks under torchrun; `seconds` from the last step to the end."""

    code: int
    log: str
    seconds: float


@pytest.fixture(scope="module")
def ended(launch, experiment, tmp_path_factory) -> dict[tuple[str, int], Future[Ended]]:
    """By fault and rank, runs with a fault in the third step, side by side: they wait more than they compute.

    One of them by the command, the others by what that calls, from a process that has imported everything.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def by_command(*words: str) -> tuple[int, str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
        done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=400, check=False)
        return done.returncode, done.stderr

    def by_forks(*words: str) -> tuple[int, str]:
        (log,) = launch(FORKED, 1, 2, *words, timeout=400)
        return int(log.splitlines()[-1]), log

    def run(start: Callable[..., tuple[int, str]], fault: str, rank: int) -> Ended:
        directory = tmp_path_factory.mktemp(fault)
        tree = experiment(run={"dir": str(directory / "run"), "max_steps": 6, "hang_timeout_seconds": 300})
        (directory / "config.yaml").write_text(yaml.safe_dump(tree))
        code, log = start(str(WORKER), str(directory / "config.yaml"), fault, str(rank), "3")
        now = time.time()
        steps = (directory / "run" / "metrics.jsonl").stat().st_mtime  # when the last good step was logged
        return Ended(code, log, now - steps)

    with ThreadPoolExecutor(2) as pool:
        faults = [("fall_asleep", 1), ("hold_the_interpreter", 1), ("crash", 0), ("crash", 1)]
        ways = {("crash", 0): by_command}
        yield {fault: pool.submit(run, ways.get(fault, by_forks), *fault) for fault in faults}


@pytest.mark.runs
@pytest.mark.parametrize("rank", [0, 1])
def test_traceback_of_the_crashed_rank_comes_first_and_the_others_end(ended, rank):
    code, log, seconds = ended["crash", rank].result()
    assert code == 1
    assert seconds < 60  # and not after the 300 that a hang may last
    first = re.search(r"^.*(Traceback|error:).*$", log, re.MULTILINE)
    assert first[0] == f"error: rank {rank} of 2 crashed"
    assert "ZeroDivisionError: the fault of this test" in log
    assert log.index("ZeroDivisionError") < log.find("lost another rank") or "lost another rank" not in log


@pytest.mark.runs
def test_rank_that_falls_asleep_is_named_with_phase_and_stack(ended):
    code, log, _ = ended["fall_asleep", 1].result()
    assert code == 1
    assert re.search(r"error: rank 1 of 2 hangs: \d+ s in teacher of step 3", log)
    assert "in fall_asleep" in log[log.index("rank 1 of 2 hangs") :]


@pytest.mark.runs
def test_rank_whose_native_code_holds_the_interpreter_is_named_by_the_others(ended):
    code, log, _ = ended["hold_the_interpreter", 1].result()
    assert code == 1
    assert re.search(r"error: rank 1 of 2 \(.*\) stopped: last seen \d+ s ago in ", log)
    assert "Last known stack of rank 1:" in log


def watched(what: str) -> subprocess.Popen:
    """A process that is watched; see `watched.py`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(WATCHED), what], env=environment, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_process_that_was_stopped_for_longer_than_a_hang_may_last_goes_on():
    process = watched("wait")
    process.send_signal(signal.SIGSTOP)
    time.sleep(7)  # the time that must not be counted, its only purpose
    process.send_signal(signal.SIGCONT)
    time.sleep(2)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")


def test_hours_in_which_nothing_ran_are_no_silence(tmp_path, monkeypatch):
    watchdog, woken = Watchdog(0, 1, 1000), time.monotonic() + 3 * 3600  # it looks every minute
    with monkeypatch.context() as clock:
        clock.setattr(time, "monotonic", lambda: woken)
        watchdog.share(tmp_path)
    watchdog.stop()
    (heartbeat,) = read_heartbeats(tmp_path, 1, besides=-1)
    assert heartbeat.silent_seconds == 120


def test_native_code_that_holds_the_interpreter_of_the_only_rank_is_ended_with_its_stack():
    process = watched("hold")
    _, err = process.communicate(timeout=110)
    assert process.returncode == -signal.SIGABRT
    assert "hangs in native code that holds the interpreter" in err
    assert "watched.py" in err


def beat(
    rank: int, beats: int, written: float, stack: str = "in all_reduce, torch/distributed/c10d.py", collectives: int = 9
) -> Heartbeat:
    return Heartbeat(rank, "host", 100 + rank, beats, collectives, "data of step 7", 30.0, written, stack)


def test_rank_with_the_fewest_beats_is_the_one_that_stopped():
    hearts = [beat(0, 41, 1000.0), beat(1, 38, 999.0), beat(2, 41, 998.5)]
    assert [h.rank for h in find_stopped(hearts, 5.0)] == [1]


def test_heartbeat_that_nobody_writes_any_more_goes_before_few_beats():
    hearts = [beat(0, 41, 1000.0), beat(1, 38, 999.0), beat(2, 41, 900.0)]
    assert [h.rank for h in find_stopped(hearts, 5.0)] == [2]


@pytest.mark.parametrize("waiting", ["torch/distributed/c10d.py", str(Path(flight.__file__))])
def test_among_equals_the_rank_outside_of_a_collective_is_the_one_that_stopped(waiting):
    hearts = [beat(rank, 41, 999.0, stack=f"in {waiting}") for rank in range(3)]
    hearts[1] = beat(1, 41, 999.0, stack="in read, loader.py")
    assert [h.rank for h in find_stopped(hearts, 5.0)] == [1]


def test_among_equals_the_rank_that_has_begun_the_fewest_collectives_is_the_one_that_stopped():
    """Under NCCL all of them wait in frames of their own code."""
    hearts = [beat(rank, 41, 999.0, stack="in tolist, agreement.py", collectives=9 - (rank == 2)) for rank in range(4)]
    assert [h.rank for h in find_stopped(hearts, 5.0)] == [2]


def test_no_rank_is_blamed_when_all_wait():
    assert find_stopped([beat(0, 41, 1000.0), beat(1, 41, 999.0)], 5.0) == []


def test_rank_that_waits_for_its_data_says_so_in_its_heartbeat(tmp_path):
    watchdog = Watchdog(0, 1, 1000, waiting=lambda: "waiting for 312 s for s3://bucket/a.tar: 503")
    watchdog.beat("data of step 7")
    watchdog.share(tmp_path)
    watchdog.stop()
    (heartbeat,) = read_heartbeats(tmp_path, 1, besides=-1)
    assert heartbeat.phase == "data of step 7, waiting for 312 s for s3://bucket/a.tar: 503"
