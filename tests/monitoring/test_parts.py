"""The small parts of the metrics: families, bands, phases, target files, event files."""

import json
import os
import re
import time
from collections import Counter

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.elastic import Grid, cost
from pipeline.elastic.sampling import SubnetSampler
from pipeline.metrics import discovery, phases
from pipeline.metrics.bands import Bands
from pipeline.metrics.discovery import TargetFile, sweep
from pipeline.metrics.families import BANDS, FAMILIES, PHASES
from pipeline.metrics.phases import Phases
from pipeline.metrics.tensorboard import EventFile
from pipeline.metrics.values import SnapshotCollector, Values

CONTRACT = {
    "poa_images_total": (),
    "poa_step": (),
    "poa_step_seconds": (),
    "poa_phase_seconds_total": ("phase",),
    "poa_images_per_second": (),
    "poa_data_wait_ratio": (),
    "poa_model_flops_utilization_ratio": (),
    "poa_loss": ("term", "branch"),
    "poa_grad_norm": ("module",),
    "poa_learning_rate": (),
    "poa_teacher_momentum": (),
    "poa_teacher_temperature": (),
    "poa_device_memory_bytes": ("kind",),
    "poa_skipped_samples_total": ("reason",),
    "poa_bad_steps_total": ("term",),
    "poa_checkpoint_seconds": (),
    "poa_checkpoint_timestamp_seconds": (),
    "poa_checkpoint_bytes": (),
    "poa_target_entropy_nats": ("branch",),
    "poa_effective_rank": ("branch",),
    "poa_prototypes_used_ratio": ("branch",),
    "poa_knn_accuracy_ratio": ("subnet",),
    "poa_slowest_rank_step_seconds": (),
    "poa_restarts_total": (),
}


def test_the_contracts_metrics_exist_with_its_labels():
    assert {name: FAMILIES[name].labels for name in CONTRACT} == CONTRACT
    assert FAMILIES["poa_run_info"].labels[:2] == ("run", "family")


def test_names_follow_prometheus_conventions():
    for name, family in FAMILIES.items():
        assert re.fullmatch(r"poa_[a-z0-9_]+", name)
        assert name.endswith("_total") == (family.kind == "counter")
        assert "rank" not in family.labels
        assert "\n" not in family.help


def test_counters_are_seen_at_zero_before_they_count():
    values, collector = Values(), SnapshotCollector()
    values.add("poa_bad_steps_total", 0, "total")
    collector.snapshot = json.loads(values.to_json())
    (metric,) = collector.collect()
    assert [(s.name, s.labels, s.value) for s in metric.samples] == [("poa_bad_steps_total", {"term": "total"}, 0.0)]
    values.add("poa_bad_steps_total", 2, "total")
    values.add("poa_bad_steps_total", 1, "total")
    assert values.get("poa_bad_steps_total", "total") == 3


@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_bands_hold_about_a_quarter_of_the_draws_each_and_rise_in_cost(family):
    model = ModelConfig.model_validate({"family": family})
    grid = Grid(model, 3)
    bands = Bands(model, grid)
    sampler = SubnetSampler(grid, lambda subnet: cost.flops(model, subnet), 1, "independent", 0)
    entries = sum(grid.multiplicity(s) for s in grid.subnets if s != grid.largest)
    drawn = Counter(bands.index(sampler.draw(step, 0)) for step in range(entries))
    assert all(abs(drawn[i] / entries - 1 / len(BANDS)) < 0.05 for i in range(len(BANDS)))
    assert bands.gflops == sorted(bands.gflops)
    assert bands.index(grid.largest) == len(BANDS) - 1
    for subnet in grid.subnets[:-1]:
        assert cost.flops(model, subnet) / 1e9 <= bands.gflops[bands.index(subnet)] * (1 + 1e-9)


def test_phases_add_up_to_the_time_that_passed(monkeypatch):
    clock = iter([0.0, 10.0, 11.0, 13.0, 16.0, 20.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))
    watch = Phases(torch.device("cpu"))
    watch.start()
    assert watch.waited_for_data() == 1.0
    watch.lap("teacher")
    watch.lap("backward")
    watch.lap("teacher")
    watch.add("checkpoint", 5.0)
    expected = {"data_wait": 1.0, "teacher": 6.0, "backward": 3.0, "checkpoint": 5.0}
    assert watch.seconds == {phase: expected.get(phase, 0.0) for phase in PHASES}


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


def test_tensorboard_reads_the_records_and_forgets_steps_done_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = EventFile(tmp_path, 0)
    for step in (1, 2, 3):
        first.add({"step": step, "time": 100.0 + step, "loss": 1.0 / step, "subnet": "1x1", "bad": ["x"]})
    first.add({"step": 4, "time": 104.0, "loss": float("nan"), "lr": 0.1})
    first.close()
    time.sleep(1.1)  # file names, by which TensorBoard orders, count whole seconds
    second = EventFile(tmp_path, 2)
    second.add({"step": 3, "time": 200.0, "loss": 7.0})
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "lr"]
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 7.0)]
