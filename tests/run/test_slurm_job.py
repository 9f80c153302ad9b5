"""What a run and its Slurm job tell each other."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline.config import load_config
from pipeline.engine.checkpoint import Progress, Written
from pipeline.errors import UserError
from pipeline.monitor.report import Timing
from pipeline.run import loop
from pipeline.run.console import Console
from pipeline.run.policy import Decision, End, Save
from pipeline.run.slurm_job import Job, stop_signals

STEP_SECONDS = 10.0


def stub(**parts: object) -> Any:
    return SimpleNamespace(**parts)


@pytest.fixture
def save(experiment, tmp_path, monkeypatch, capsys):
    """Stop and save as rank 0, with a signal that comes so many seconds before the end; gives what is printed."""

    class Checkpoints:
        """Takes no time."""

        step: int | None = None
        root = tmp_path

        def can_move_on(self, parts: int) -> bool:
            return False

        def begin(self, engine, centering, progress) -> None:
            self.step = progress.step

        def finish(self, retire: bool) -> Written | None:
            step, self.step = self.step, None
            return None if step is None else Written(step, tmp_path, 0.0)

    agreed = stub(parts_saved=0)

    def run(lead: float) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(experiment(checkpoint={"signal_lead_seconds": lead})))
        config = load_config(path)
        loop.Run(
            config,
            directory=stub(),
            job=Job.from_environment(),
            watchdog=stub(beat=lambda phase: None),
            trainer=stub(
                ranks=stub(is_main=True),
                engine=None,
                tri_branch=stub(centering=None),
                phases=stub(add=lambda phase, seconds: None),
            ),
            checkpoints=Checkpoints(),
            progress=stub(step=7, bad_in_a_row=0),
            monitor=stub(saved=lambda *_: None),
            evaluation=stub(),
            console=Console(speaks=True, last_step=9, first_step=0),
        ).save(Decision(False, False, Save.NOW, End.STOPPED), stub(timing=Timing(0.0, STEP_SECONDS), agreed=agreed))
        return capsys.readouterr().err

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("POA_JOB_DIR", str(tmp_path))
    return run


def test_signal_that_comes_too_late_for_two_saves_is_warned_of(save):
    (line,) = save(1.9 * STEP_SECONDS).splitlines()
    assert line.startswith("warning: a step and a checkpoint take 10 s, and Slurm's signal comes 19 s before the end")
    assert "(checkpoint.signal_lead_seconds): submit with --signal=USR1@20 or more" in line


def test_signal_that_comes_in_time_is_not(save):
    assert save(2.1 * STEP_SECONDS) == ""


def test_no_job_no_warning(save, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    assert save(1.9 * STEP_SECONDS) == ""


def test_job_script_is_told_of_the_checkpoint_and_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("POA_JOB_DIR", str(tmp_path))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    job = Job.from_environment()
    assert job is not None
    assert job.name == "12.3"
    job.saved(7)
    assert (tmp_path / "progress").read_text() == "7\n"
    job.ended("stay")
    assert (tmp_path / "end.3").read_text() == "stay\n"


def test_a_second_ctrl_c_ends_the_process_wherever_it_is():
    script = """
import time
from pipeline.run.slurm_job import stop_signals
with stop_signals() as received:
    print("ready", flush=True)
    while not received:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(100)
"""
    words = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[2]}
    process = subprocess.Popen([sys.executable, "-c", script], **words)
    for word in ("ready\n", "saving\n"):
        assert process.stdout.readline() == word
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert err == "\ninterrupted: saving after this step; once more ends it at once\n"


def test_a_lost_terminal_is_a_request_to_stop_unless_it_is_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, received in ((signal.SIG_DFL, [signal.SIGHUP]), (signal.SIG_IGN, [])):
            signal.signal(signal.SIGHUP, handler)
            with stop_signals() as collected:
                signal.raise_signal(signal.SIGHUP)
                assert collected == received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_job_script_that_cannot_be_told_ends_no_run(tmp_path, capsys):
    Job("7", 0, tmp_path / "gone").saved(3)
    assert "cannot tell the job script '3'" in capsys.readouterr().err


def test_count_of_requeues_may_be_empty_and_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for value, name in {"": "7.0", "2": "7.2"}.items():
        monkeypatch.setenv("SLURM_RESTART_COUNT", value)
        job = Job.from_environment()
        assert job is not None
        assert job.name == name
    monkeypatch.setenv("SLURM_RESTART_COUNT", "x")
    with pytest.raises(UserError, match="SLURM_RESTART_COUNT=x is no number"):
        Job.from_environment()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_that_gives_up_is_told_what_it_has_not_tried(precision, capsys):
    console = Console(speaks=True, last_step=9, first_step=0)
    progress = Progress(step=7, samples=56, bad_steps={"dino/intact": 3}, bad_in_a_row=3, skipped_samples={})
    console.ended(End.GIVE_UP, progress, 4, ["dino/intact"], [], Path("c"), precision)
    err = capsys.readouterr().err
    assert "lower optim.base_lr" in err
    assert ("engine.precision=fp32" in err) == (precision == "bf16")
