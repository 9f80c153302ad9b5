"""Target files for Prometheus."""

import json
import os
import time

from pipeline.monitor import discovery
from pipeline.monitor.discovery import TargetFile, sweep


def test_a_target_file_is_removed_only_by_its_owner(tmp_path):
    first = TargetFile(tmp_path / "targets", tmp_path / "runs" / "a", "n1")
    first.write("n1:9400")
    later = TargetFile(tmp_path / "targets", tmp_path / "runs" / "a", "n1")
    later.write("n1:9401")  # the run was started again on this node
    first.remove("n1:9400")
    assert json.loads(later.path.read_text()) == [
        {"targets": ["n1:9401"], "labels": {"job": "poa", "run": "a", "node": "n1", "instance": "n1"}}
    ]
    later.remove("n1:9401")
    assert not list((tmp_path / "targets").iterdir())


def test_two_runs_of_one_name_do_not_share_a_target_file(tmp_path):
    paths = {TargetFile(tmp_path, tmp_path / user / "a", "n1").path for user in ("ann", "bob")}
    assert len(paths) == 2


def test_only_entries_that_nobody_touches_are_swept(tmp_path):
    dead, alive = (TargetFile(tmp_path, tmp_path / name, "n1") for name in ("dead", "alive"))
    for target in (dead, alive):
        target.write("n1:9400")
        os.utime(target.path, (0, time.time() - discovery.STALE_SECONDS - 1))
    alive.touch()
    other = tmp_path / "someone-elses.json"
    other.write_text("[]")
    os.utime(other, (0, 0))
    assert sweep(tmp_path) == [dead.path]
    assert sorted(tmp_path.glob("*.json")) == sorted([alive.path, other])
