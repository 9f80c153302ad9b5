"""A run directory has one owner, and a later attempt of a job takes it from an earlier one."""

import threading
import time

import pytest
import yaml

from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.run import ownership
from pipeline.run.directory import RunDirectory
from pipeline.run.slurm_job import Job


@pytest.fixture
def config(experiment, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(experiment()))
    return load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("second", [None, Job("8", 0, None), Job("7", 0, None)])
def test_second_process_is_refused_while_the_first_trains(config, tmp_path, second):
    first = RunDirectory(tmp_path / "run")
    first.claim(config, Job("7", 0, None))
    with pytest.raises(UserError, match="another process is training here"):
        RunDirectory(tmp_path / "run").claim(config, second)
    first.require_ownership()


def test_a_step_looks_for_another_owner_now_and_then(config, tmp_path, monkeypatch):
    run, owner = RunDirectory(tmp_path / "run"), tmp_path / "run" / ".owner"
    run.claim(config, Job("7", 0, None))
    run.notice_take_over()
    owner.write_text("7.1\n")
    run.notice_take_over()  # it has just looked
    monkeypatch.setattr(ownership, "_LOOK_SECONDS", 0.0)
    run._owner._next_look = 0.0
    with pytest.raises(RuntimeError, match=r"taken over by 7\.1"):
        run.notice_take_over()
    owner.unlink()
    run.notice_take_over()  # a file that is away, or cannot be read, names no other owner
    owner.mkdir()
    run.notice_take_over()


def test_later_attempt_takes_over_and_the_earlier_one_may_write_no_more(config, tmp_path):
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.claim(config, Job("7", 0, None))
    taking = threading.Thread(target=second.claim, args=(config, Job("7", 1, None)))
    taking.start()
    for _ in range(100):
        if "7.1" in (tmp_path / "run" / ".owner").read_text():
            break
        time.sleep(0.1)
    with pytest.raises(RuntimeError, match=r"taken over by 7\.1"):
        first.require_ownership()
    assert taking.is_alive()  # it waits until the other has let go
    first.release()
    taking.join(10)
    assert not taking.is_alive()
    second.require_ownership()


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(config, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.claim(config)
    run.require_no_past()
    run.metrics.write_text('{"step": 1}\n{"step": 2, "checkpoint_seconds": 0.1}\n{"step": 3}\n')
    with pytest.raises(
        UserError, match=r"has been at step 2 and has no checkpoint now \(.*checkpoints\): bring them back"
    ):
        run.require_no_past()
    run.metrics.unlink()
    (run.path / "manifest.json").write_text('{"starts": [{"step": 0}, {"step": 40}]}')
    with pytest.raises(UserError, match="has been at step 40"):
        run.require_no_past()
    (run.path / "manifest.json").write_text('{"starts": [{"st')
    with pytest.raises(UserError, match="not a manifest"):
        run.require_no_past()
    run.release()


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"starts": 3}', '{"starts": null}', '{"starts": [{"step": "1"}]}', '{"settings": [{"from_step": 0}]}'],
)
def test_manifest_that_holds_something_else_is_refused_where_it_is_read(config, tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"not a manifest.*manifest\.json"):
        RunDirectory(tmp_path).settle(config, 2)


def test_what_is_in_the_way_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use the run directory: Not a directory \(.*file"):
        RunDirectory(tmp_path / "file" / "run").claim(config)
    run = RunDirectory(tmp_path / "run")
    run.claim(config)
    run.metrics.mkdir()
    with pytest.raises(UserError, match=r"cannot use the run directory: Is a directory \(.*metrics\.jsonl"):
        run.rewind(3, 12)
    run.release()
