"""Target files for Prometheus."""

import json
import os
import re
import time

from pipeline.monitor import discovery
from pipeline.monitor.discovery import TargetFile, run_label, sweep


def test_a_target_file_is_removed_only_by_its_owner(tmp_path):
    first = TargetFile(tmp_path / "targets", tmp_path / "runs" / "a", "n1")
    first.write("n1:9400")
    later = TargetFile(tmp_path / "targets", tmp_path / "runs" / "a", "n1")
    later.write("n1:9401")  # the run was started again on this node
    first.remove("n1:9400")
    assert json.loads(later.path.read_text()) == [
        {"targets": ["n1:9401"], "labels": {"job": "poa", "run": first.labels["run"], "node": "n1", "instance": "n1"}}
    ]
    later.remove("n1:9401")
    assert not list((tmp_path / "targets").iterdir())


def test_two_runs_of_one_name_share_neither_target_file_nor_label(tmp_path):
    targets = [TargetFile(tmp_path, tmp_path / user / "sweep" / "1", "n1") for user in ("ann", "bob")]
    assert len({target.path for target in targets}) == 2
    assert len({target.labels["run"] for target in targets}) == 2
    assert all(target.labels["run"].startswith("sweep/1-") for target in targets)


def test_a_label_can_stand_in_an_expression_and_in_a_page(tmp_path):
    label = run_label(tmp_path / 'x"y' / "a<b\n\udcff é")
    assert re.fullmatch(r"x_y/a_b__ _-[0-9a-f]{6}", label)
    assert run_label(tmp_path / "a") == run_label(tmp_path / "b" / ".." / "a")


def test_an_entry_that_was_swept_is_written_again(tmp_path):
    target = TargetFile(tmp_path / "targets", tmp_path / "a", "n1")
    target.write("n1:9400")
    text = target.path.read_text()
    target.path.unlink()
    target.path.parent.rmdir()
    target.touch("n1:9400")
    assert target.path.read_text() == text


def test_only_entries_that_nobody_touches_are_swept(tmp_path):
    dead, alive = (TargetFile(tmp_path, tmp_path / name, "n1") for name in ("dead", "alive"))
    for target in (dead, alive):
        target.write("n1:9400")
        os.utime(target.path, (0, time.time() - discovery.STALE_SECONDS - 1))
    alive.touch("n1:9400")
    other = tmp_path / "someone-elses.json"
    other.write_text("[]")
    os.utime(other, (0, 0))
    assert sweep(tmp_path) == [dead.path]
    assert sorted(tmp_path.glob("*.json")) == sorted([alive.path, other])
