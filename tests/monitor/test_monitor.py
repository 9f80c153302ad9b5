"""What a rank tells about itself, from reports made by hand; and that no failure of it reaches training."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from pipeline.config import parse_config
from pipeline.data.loader import Tally
from pipeline.data.remote.patience import Weather
from pipeline.elastic import Grid, Subnet
from pipeline.engine.agreement import Agreement
from pipeline.engine.checkpoint import Progress
from pipeline.engine.distributed import Ranks
from pipeline.measure.bands import Bands
from pipeline.measure.health import BranchHealth
from pipeline.measure.metrics import PHASES
from pipeline.measure.peak import Peak
from pipeline.measure.phases import Phases
from pipeline.method.schedules import StepValues
from pipeline.method.tri_branch import TERMS
from pipeline.monitor import monitor as monitor_module
from pipeline.monitor.discovery import run_label
from pipeline.monitor.monitor import Monitor
from pipeline.monitor.report import Health, StepReport, Timing

STEP_VALUES = StepValues(
    **dict.fromkeys(StepValues.__dataclass_fields__, 0.5)  # type: ignore[arg-type]
)
REPORT = StepReport(
    Agreement(
        losses={"/".join(term): 1.0 for term in TERMS} | {"total": 8.0},
        gradient_norms={"backbone": 3.0, "heads": 4.0},
        bad=[],
        stop=False,
        skipped=0,
        flops=5e9,
        parts_saved=0,
        band_steps=[1.0, 0.0, 0.0, 0.0],
        band_losses=[2.0, 0.0, 0.0, 0.0],
    ),
    values=STEP_VALUES,
    subnet=Subnet(32, (2,)),
    timing=Timing(data_wait=0.25, step=1.0),
    phases=dict.fromkeys(PHASES, 0.0),
    health=None,
)


class _Exporter:
    """Stands at the end of the line and keeps what it is offered."""

    def __init__(self, *args: object, **kwargs: object):
        self.offers = 0

    def offer(self, values: object, at_once: bool = False) -> None:
        self.offers += 1

    def close(self, values: object, linger: bool) -> None:
        self.lingered = linger


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture
def made(ranks, experiment, tmp_path, monkeypatch) -> tuple[Monitor, Progress]:
    monkeypatch.setattr(monitor_module, "Exporter", _Exporter)
    monkeypatch.setattr(monitor_module, "device_peak", lambda device, dtype: Peak(1e10, "measured"))
    config = parse_config(experiment(run={"dir": str(tmp_path), "checkpoint_every_steps": 7}, metrics={"port": 0}))
    (tmp_path / "manifest.json").write_text(json.dumps({"starts": [1, 2, 3], "code": "abc"}))
    progress = Progress(10, 40, {"total": 1}, 0, {"huge": 5})
    bands = Bands(config.model, Grid(config.model))
    return Monitor(config, ranks, Phases(torch.device("cpu")), bands, progress, 20, Tally()), progress


def test_a_start_describes_the_run_and_counts_from_zero(made, tmp_path):
    values = made[0].values
    assert values.get("poa_run_info", run_label(tmp_path), "vit", "", 1, "abc") == 1
    assert values.get("poa_restarts_total") == 2
    assert values.get("poa_last_step") == 20
    assert values.get("poa_checkpoint_step") == 10
    assert values.get("poa_checkpoint_every_steps") == 7
    assert values.get("poa_effective_rank_max") == 8  # two global crops of four images
    assert values.get("poa_bad_steps_total", "ibot/elastic") == 0
    assert values.get("poa_skipped_samples_total", "huge") == 0


def test_steps_and_log_lines_give_rates_of_the_interval(made):
    monitor, progress = made
    for _ in range(4):
        monitor.step(progress, REPORT)
    spent = dict.fromkeys(PHASES, 0.0) | {"data_wait": 1.0, "backward": 2.0, "reduce": 0.5}
    fields = monitor.log(replace(REPORT, phases=spent))
    values = monitor.values
    assert values.get("poa_images_total") == 16
    assert values.get("poa_images_per_second") == 4
    assert values.get("poa_data_wait_ratio") == 0.25
    assert values.get("poa_model_flops_utilization_ratio") == 0.5
    assert values.get("poa_slowest_rank_step_seconds") == 0.75  # waiting for others is no work of its own
    assert values.get("poa_phase_seconds_total", "backward") == 2.0
    assert values.get("poa_subnet_steps_total", "q1") == 4
    assert values.get("poa_subnet_loss", "q1") == 2.0
    assert values.get("poa_loss", "ibot", "intact") == 1.0
    assert values.get("poa_loss", "total", "all") == 8.0
    assert fields["backward_seconds_per_step"] == 0.5
    assert fields["mfu"] == 0.5
    monitor.step(progress, REPORT)
    assert monitor.log(replace(REPORT, phases=spent))["backward_seconds_per_step"] == 0.0  # a new interval


def test_faults_are_counted_since_this_start(made):
    monitor, progress = made
    losses = REPORT.agreed.losses | {"dino/intact": float("nan")}
    bad = replace(REPORT, agreed=replace(REPORT.agreed, bad=["dino/intact"], losses=losses))
    progress.skipped_samples["huge"] += 2
    monitor.step(progress, bad)
    assert monitor.values.get("poa_bad_steps_total", "dino/intact") == 1
    assert monitor.values.get("poa_skipped_samples_total", "huge") == 2


def test_health_and_checkpoints_reach_metrics_and_the_next_record(made, tmp_path):
    monitor, progress = made
    look = BranchHealth(entropy=1.0, uniform_kl=2.0, used=0.5, effective_rank=3.0, deviation=0.25)
    (tmp_path / "shard").write_bytes(b"12345")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "shard").write_bytes(b"12345")
    monitor.step(progress, replace(REPORT, health=Health({"teacher": look, "q2": look}, {"cls": 7.0})))
    monitor.saved(14, tmp_path / "saved", 2.5)
    monitor.knn(10, {"32x2": 0.75}, 1.0)
    fields = monitor.log(REPORT)
    values = monitor.values
    assert values.get("poa_effective_rank", "teacher") == 3.0
    assert values.get("poa_band_feature_std", "q2") == 0.25
    assert values.get("poa_center_norm", "cls") == 7.0
    assert values.get("poa_checkpoint_bytes") == 5
    assert values.get("poa_checkpoint_step") == 14
    assert values.get("poa_knn_accuracy_ratio", "32x2") == 0.75
    expected = {"entropy_teacher": 1.0, "uniform_kl_teacher": 2.0, "effective_rank_q2": 3.0, "knn_32x2": 0.75}
    assert expected.items() <= fields.items()
    assert not expected.keys() & monitor.log(REPORT).keys()  # told once


def test_a_failure_inside_is_reported_once_and_training_goes_on(made, monkeypatch, capsys):
    monitor, progress = made

    def fail(*args: object) -> None:
        raise OSError("no such luck")

    monkeypatch.setattr(monitor, "_count_step", fail)
    monkeypatch.setattr(monitor, "_set_run", fail)
    for _ in range(3):
        monitor.step(progress, REPORT)
        assert monitor.log(REPORT) == {}
    monitor.__exit__()
    assert capsys.readouterr().err.count("no such luck") == 1


def test_only_a_complete_run_waits_for_its_last_scrape(made):
    monitor, _ = made
    monitor.__exit__()
    assert monitor._exporter.lingered is False
    monitor.complete = True
    monitor.__exit__()
    assert monitor._exporter.lingered is True


def test_weather_of_the_store_is_counted_per_node_and_samples_per_source(ranks, experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor_module, "Exporter", _Exporter)
    monkeypatch.setattr(monitor_module, "device_peak", lambda device, dtype: Peak(1e10, "measured"))
    weather = Weather()
    monkeypatch.setattr(monitor_module, "WEATHER", weather)
    config = parse_config(experiment(run={"dir": str(tmp_path)}, metrics={"port": 0}))
    (tmp_path / "manifest.json").write_text(json.dumps({"starts": [1], "code": "abc"}))
    tally = Tally(Counter({"": 3}))
    bands = Bands(config.model, Grid(config.model))
    monitor = Monitor(config, ranks, Phases(ranks.device), bands, Progress(0, 0, {}, 0, {}), 20, tally)
    get = monitor.values.get
    assert get("poa_batches_apart_total", "pixels") == 0
    tally.apart["pixels"] += 2
    assert get("poa_fetch_retries_total", "server") == 0
    tally.used["street"] += 5
    weather.retried("server")
    for source, size in (("street", 100), ("", 7), ("street", 1)):
        weather.read(source, size, 0.25)
    weather.kept("street", 900)
    for found in (True, False, True):
        weather.looked_up(found)
    monitor.step(Progress(1, 4, {}, 0, {}), REPORT)
    monitor.log(REPORT)
    assert (get("poa_source_samples_total", "street"), get("poa_source_samples_total", "train")) == (5, 3)
    assert (get("poa_batches_apart_total", "pixels"), get("poa_batches_apart_total", "decode")) == (2, 0)
    assert (get("poa_fetched_bytes_total", "street"), get("poa_fetched_bytes_total", "train")) == (1001, 7)
    assert (get("poa_cache_hits_total"), get("poa_cache_misses_total")) == (2, 1)
    assert (get("poa_fetch_retries_total", "server"), get("poa_fetch_wait_seconds_total")) == (1, 0.75)
