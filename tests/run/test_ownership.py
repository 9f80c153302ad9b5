"""Who owns a run directory where `flock` does not work: a file that its owner renews."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run.ownership import Flock, locks_work

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "workers" / "own_directory.py"
ALIVE, NOT_RENEWED = 3.0, 0.5  # seconds until a file is old: for an owner that a loaded machine delays, and for none


class Process(subprocess.Popen):
    """A process that claims a directory, on a file system without locks; see `own_directory.py`."""

    def __init__(self, directory: Path, *job: object, stale: float = ALIVE, preload: Path | None = None):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"LD_PRELOAD": str(preload)} if preload else {})}
        command = [sys.executable, str(WORKER), *map(str, (directory, stale, *job))]
        super().__init__(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        return self.stdout.readline().strip()

    def ask(self) -> str:
        self.stdin.write("still?\n")
        self.stdin.flush()
        return self.says()

    def end(self) -> None:
        self.stdin.close()
        self.wait()


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose `flock` answers like a file system that has none."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build a flock that fails")
    directory = tmp_path_factory.mktemp("flock")
    (directory / "flock.c").write_text("#include <errno.h>\nint flock(int f, int o) { errno = ENOLCK; return -1; }\n")
    library = directory / "flock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, directory / "flock.c"], check=True)
    return library


@pytest.fixture
def claim(no_locks, tmp_path):
    started = []

    def run(*job: object, stale: float = ALIVE) -> Process:
        started.append(Process(tmp_path, *job, stale=stale, preload=no_locks))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_second_process_is_refused_as_long_as_the_first_lives(claim, tmp_path):
    first = claim()
    assert first.says() == "claimed"
    assert claim().says().startswith("another process is training here (")
    assert first.ask() == "owner"
    first.end()
    assert not (tmp_path / ".lock.owner").exists()
    assert claim().says() == "claimed"


def test_file_of_a_process_that_was_killed_here_is_taken_over(claim):
    first = claim()
    assert first.says() == "claimed"
    first.kill()
    first.wait()
    assert claim().says() == "claimed"


def test_file_of_another_machine_is_taken_over_when_nobody_renews_it(claim, tmp_path):
    there = {"host": "n9", "pid": 1, "machine": "another", "renewed": 0.0, "started": "5"}
    (tmp_path / ".lock.owner").write_text(json.dumps(there))
    assert claim(stale=NOT_RENEWED).says() == "claimed"
    assert json.loads((tmp_path / ".lock.owner").read_text())["machine"] != "another"


def test_process_that_was_stopped_meanwhile_learns_that_it_is_no_owner_any_more(claim):
    first = claim()
    assert first.says() == "claimed"
    first.send_signal(signal.SIGSTOP)
    assert claim(stale=NOT_RENEWED).says() == "claimed"
    first.send_signal(signal.SIGCONT)
    assert "was taken over by" in first.ask()


def test_later_attempt_of_a_job_waits_until_the_earlier_one_is_gone(claim):
    first = claim(7, 0)
    assert first.says() == "claimed"
    second = claim(7, 1)
    while first.ask() == "owner":
        pass
    first.end()
    assert second.says() == "claimed"


def test_locks_are_used_where_they_work(tmp_path):
    first = Process(tmp_path)
    assert first.says() == "claimed"
    assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock.owner").exists()
    assert Process(tmp_path).says().startswith("another process is training here (")
    first.end()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL, errno.EIO, errno.EBADF, errno.EACCES, errno.ENOSYS])
def test_whatever_a_file_system_says_of_locks_it_has_none(number, tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert not locks_work(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_lock_that_is_denied_is_held_by_another(tmp_path, monkeypatch):
    def deny(file, operation):
        raise PermissionError(errno.EACCES, "Permission denied")

    lock = Flock(tmp_path / ".lock")
    assert lock.acquire()
    monkeypatch.setattr("fcntl.flock", deny)
    assert not Flock(tmp_path / ".lock").acquire()
