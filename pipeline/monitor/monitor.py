"""What training tells about itself: step by step on each rank, joined over the ranks at every log line."""

import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import ExperimentConfig
from pipeline.data.loader import APART, Tally
from pipeline.data.remote.patience import WEATHER
from pipeline.elastic import Grid, cost
from pipeline.engine.agreement import BAD_VALUES
from pipeline.engine.checkpoint import Progress
from pipeline.engine.distributed import Ranks
from pipeline.engine.layouts import working_dtype
from pipeline.measure.bands import Bands
from pipeline.measure.health import largest_entropy
from pipeline.measure.memory import memory_bytes
from pipeline.measure.metrics import BANDS, BUSY_PHASES, PHASES
from pipeline.measure.peak import device_peak
from pipeline.measure.phases import Phases
from pipeline.monitor.discovery import run_label
from pipeline.monitor.exporter import Exporter
from pipeline.monitor.report import Health, StepReport
from pipeline.monitor.sinks import Background, open_sinks, require_packages
from pipeline.monitor.tensorboard import EventFile
from pipeline.monitor.values import Values

SKIP_REASONS = ("decode", "empty", "format", "header", "huge", "precision", "read", "truncated")
FETCH_REASONS = ("connection", "disk", "range", "server", "short", "throttled", "timeout")
_UNNAMED = "train"  # a source without a name, as a label
_STATS = ("min", "mean", "max")


@dataclass
class _Interval:
    """Sums since the last log line."""

    steps: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0
    flops: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    band_steps: list[float] = field(default_factory=lambda: [0.0] * len(BANDS))
    band_losses: list[float] = field(default_factory=lambda: [0.0] * len(BANDS))


class Share(NamedTuple):
    """What a rank adds to a log line, of the steps since the last one.

    Attributes:
        busy, data_wait: its own work and its wait for data, seconds per step.
        wait_ratio: share of the time that it waited for data.
        total: seconds by phase since the process started.
        per_step: seconds by phase and step.
        memory: bytes by kind; the last kind is the peak.
        used: samples by source since the process started.
        apart: batches made beside the rank's pipeline by reason.
        fetched: bytes from stores by source.
        retries: reads tried again by reason.
        fetch_wait: seconds that samples waited for stores.
        hits, misses: samples that the node's cache had, or had not.
    """

    busy: float
    data_wait: float
    wait_ratio: float
    total: dict[str, float]
    per_step: dict[str, float]
    memory: dict[str, int]
    used: dict[str, int]
    apart: dict[str, int]
    fetched: dict[str, int]
    retries: dict[str, int]
    fetch_wait: float
    hits: int
    misses: int


class Monitor:
    """Metrics of one rank; the first rank of each node serves its node's, rank 0 also the run's.

    Every rank calls every method at the same step. Nothing here may end a run: what fails on this rank alone is
    reported once and then left out.

    Args:
        config: the experiment.
        ranks: this process and its peers.
        phases: the stop watch of the trainer.
        bands: cost bands of the sub-networks.
        progress: where the run starts.
        last_step: where it ends.
        tally: of this rank's loader.

    Attributes:
        complete: the run got there, so that whoever reads the metrics should see the last values.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        ranks: Ranks,
        phases: Phases,
        bands: Bands,
        progress: Progress,
        last_step: int,
        tally: Tally,
    ):
        self.config, self.ranks, self.phases = config, ranks, phases
        self._tally = tally
        self.values = Values()
        self._interval = _Interval(phases=dict(phases.seconds))
        self._later: dict[str, Any] = {}
        self.complete = self._failed = False
        self._exporter: Exporter | None = None
        self._events: EventFile | None = None
        self._sinks: list[Background] = []
        require_packages(config.metrics)
        node = os.environ.get("SLURMD_NODENAME", platform.node())
        nodes = ranks.gather(node)
        elsewhere = len(set(nodes)) > 1 or "SLURM_JOB_ID" in os.environ  # no Prometheus runs on a compute node
        self._peers = [rank for rank, name in enumerate(nodes) if name == node]
        self._leads = self._peers[0] == ranks.rank
        with self._carefully():
            self._peak = device_peak(ranks.device, working_dtype(config.engine))
            if self._leads:
                for reason in FETCH_REASONS:
                    self.values.add("poa_fetch_retries_total", 0, reason)
                self._exporter = Exporter(config.metrics, Path(config.run.dir), node, ranks.is_main, elsewhere)
            if ranks.is_main:
                self._describe(bands, progress, last_step)
                if config.metrics.tensorboard:
                    self._events = EventFile(Path(config.run.dir) / "tensorboard", progress.step)
                self._sinks = open_sinks(config.metrics, Path(config.run.dir), config.model_dump(mode="json"))

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        """End the endpoint; after a complete run Prometheus may read the last values first."""
        with self._carefully():
            if self._events:
                self._events.close()
            for sink in self._sinks:
                sink.close(self.complete)
            if self._exporter:
                self._exporter.close(self.values, linger=self.complete)

    def step(self, progress: Progress, report: StepReport) -> None:
        """After every step; costs no communication."""
        interval, agreed = self._interval, report.agreed
        interval.steps += 1
        interval.seconds += report.timing.step
        interval.data_wait += report.timing.data_wait
        interval.flops += agreed.flops
        for band, (count, loss) in enumerate(zip(agreed.band_steps, agreed.band_losses, strict=True)):
            interval.band_steps[band] += count
            interval.band_losses[band] += loss
        with self._carefully():
            if self._leads:
                self._count_step(progress, report)
            if self.ranks.is_main:
                self._count_run(progress, report)
            if self._exporter:
                self._exporter.offer(self.values)

    def alive(self) -> None:
        """Between two steps this rank got on, as in an evaluation; costs no communication."""
        with self._carefully():
            if self._leads:
                self.values.set("poa_step_timestamp_seconds", time.time())
            if self._exporter:
                self._exporter.offer(self.values)

    def log(self, report: StepReport) -> dict[str, Any]:
        """At every log line: what to add to the record. Collective."""
        shares = self.ranks.gather(self._share(report.phases))
        interval, self._interval = self._interval, _Interval(phases=report.phases)
        fields: dict[str, Any] = {}
        with self._carefully():
            if self._leads:
                self._set_node([shares[rank] for rank in self._peers])
            if self.ranks.is_main:
                self._set_schedules(report)
                fields = self._set_run(interval, shares) | self._later
                self._later = {}
            if self._exporter:
                self._exporter.offer(self.values, at_once=True)
        return fields

    def logged(self, record: dict[str, Any]) -> None:
        """Repeat a record of `metrics.jsonl` for TensorBoard and whoever else wants it."""
        with self._carefully():
            if self._events:
                self._events.add(record)
            for sink in self._sinks:
                sink.add(record)

    def saved(self, step: int, path: Path | None, seconds: float) -> None:
        """A checkpoint is complete, `seconds` after its snapshot."""
        if self.ranks.is_main and path is not None:
            with self._carefully():
                self.values.set("poa_checkpoint_seconds", seconds)
                self.values.set("poa_checkpoint_timestamp_seconds", time.time())
                self.values.set("poa_checkpoint_step", step)
                self.values.set("poa_checkpoint_bytes", sum(f.stat().st_size for f in path.iterdir()))
                self._later["checkpoint_seconds"] = seconds

    def knn(self, step: int, accuracies: Mapping[str, float], seconds: float) -> None:
        """Accuracies by name of sub-network."""
        for name, accuracy in accuracies.items():
            self.values.set("poa_knn_accuracy_ratio", accuracy, name)
            self._later[f"knn_{name}"] = accuracy
        self._later |= {"knn_step": step, "knn_seconds": seconds}

    @contextmanager
    def _carefully(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._failed:
                print(f"warning: metrics of rank {self.ranks.rank} fail ({error!r}); training goes on", file=sys.stderr)
            self._failed = True

    def _describe(self, bands: Bands, progress: Progress, last_step: int) -> None:
        config, values = self.config, self.values
        manifest = json.loads((Path(config.run.dir) / "manifest.json").read_text(encoding="utf-8"))
        job = os.environ.get("SLURM_JOB_ID", "")
        labels = (run_label(Path(config.run.dir)), config.model.family, job, self.ranks.world_size)
        values.set("poa_run_info", 1, *labels, manifest["code"])
        values.set("poa_device_peak_flops", self._peak.flops, self._peak.source)
        values.set("poa_last_step", last_step)
        values.set("poa_student_temperature", config.loss.student_temp)
        values.set("poa_target_entropy_max_nats", largest_entropy(config.heads.prototypes))
        values.set("poa_checkpoint_every_steps", config.run.checkpoint_every_steps)
        values.set("poa_checkpoint_step", progress.step)
        values.add("poa_restarts_total", len(manifest["starts"]) - 1)
        sample = min(2 * config.data.batch_size, cost.feature_dim(config.model, Grid(config.model).largest))
        values.set("poa_effective_rank_max", sample)
        for term in BAD_VALUES:
            values.add("poa_bad_steps_total", 0, term)
        for reason in SKIP_REASONS:
            values.add("poa_skipped_samples_total", 0, reason)
        for reason in APART:
            values.add("poa_batches_apart_total", 0, reason)
        for band, gflops in zip(BANDS, bands.gflops, strict=True):
            values.add("poa_subnet_steps_total", 0, band)
            values.set("poa_band_gflops", gflops, band)
        self._skipped_before = dict(progress.skipped_samples)

    def _count_step(self, progress: Progress, report: StepReport) -> None:
        values = self.values
        values.set("poa_step", progress.step)
        values.set("poa_step_timestamp_seconds", time.time())
        values.add("poa_images_total", len(self._peers) * self.config.data.batch_size)
        values.observe_step(report.timing.step)

    def _count_run(self, progress: Progress, report: StepReport) -> None:
        values, agreed = self.values, report.agreed
        values.set("poa_samples", progress.samples)
        values.set("poa_epoch", report.values.epoch)
        for term in agreed.bad:
            values.add("poa_bad_steps_total", 1, term)
        for reason, count in progress.skipped_samples.items():
            values.set("poa_skipped_samples_total", count - self._skipped_before.get(reason, 0), reason)
        for band, drawn in zip(BANDS, agreed.band_steps, strict=True):
            values.add("poa_subnet_steps_total", drawn, band)
        for name, loss in agreed.losses.items():
            term, _, branch = name.partition("/")
            values.set("poa_loss", loss, term, branch or "all")
        for module, norm in agreed.gradient_norms.items():
            values.set("poa_grad_norm", norm, module)
        if report.health:
            self._later |= self._set_health(report.health)

    def _share(self, seconds: dict[str, float]) -> Share:
        interval = self._interval
        steps = max(interval.steps, 1)
        spent = {phase: seconds[phase] - interval.phases[phase] for phase in PHASES}
        return Share(
            busy=sum(spent[phase] for phase in BUSY_PHASES) / steps,
            data_wait=interval.data_wait / steps,
            wait_ratio=interval.data_wait / max(interval.seconds, 1e-9),
            total=dict(seconds),
            per_step={phase: spent[phase] / steps for phase in PHASES},
            memory=memory_bytes(self.ranks.device),
            used=dict(self._tally.used),
            apart=dict(self._tally.apart),
            fetched=dict(WEATHER.fetched),
            retries=dict(WEATHER.retries),
            fetch_wait=WEATHER.waited,
            hits=WEATHER.hits,
            misses=WEATHER.misses,
        )

    def _set_node(self, shares: list[Share]) -> None:
        values = self.values
        values.set("poa_data_wait_ratio", _mean(share.wait_ratio for share in shares))
        for phase in PHASES:
            values.set("poa_phase_seconds_total", _mean(share.total[phase] for share in shares), phase)
        values.set("poa_fetch_wait_seconds_total", sum(share.fetch_wait for share in shares))
        values.set("poa_cache_hits_total", sum(share.hits for share in shares))
        values.set("poa_cache_misses_total", sum(share.misses for share in shares))
        fetched = _total(share.fetched for share in shares)
        for source in _total(share.used for share in shares):  # of one that lies on a disk 0, so that none is missed
            values.set("poa_fetched_bytes_total", fetched.get(source, 0), source or _UNNAMED)
        for reason, count in _total(share.retries for share in shares).items():
            values.set("poa_fetch_retries_total", count, reason)
        for kind in shares[0].memory:
            values.set("poa_device_memory_bytes", max(share.memory[kind] for share in shares), kind)

    def _set_run(self, interval: _Interval, shares: list[Share]) -> dict[str, Any]:
        values = self.values
        for name, numbers in (
            ("poa_rank_busy_seconds", [share.busy for share in shares]),
            ("poa_rank_data_wait_seconds", [share.data_wait for share in shares]),
        ):
            for stat, value in zip(_STATS, (min(numbers), _mean(numbers), max(numbers)), strict=True):
                values.set(name, value, stat)
        for source, samples in _total(share.used for share in shares).items():
            values.set("poa_source_samples_total", samples, source or _UNNAMED)
        for reason, batches in _total(share.apart for share in shares).items():
            values.set("poa_batches_apart_total", batches, reason)
        slowest = max(range(len(shares)), key=lambda rank: shares[rank].busy)
        images = interval.steps * self.config.data.batch_size * self.ranks.world_size
        seconds = max(interval.seconds, 1e-9)
        utilization = interval.flops / (self._peak.flops * self.ranks.world_size * seconds)
        values.set("poa_slowest_rank", slowest)
        values.set("poa_slowest_rank_step_seconds", shares[slowest].busy)
        values.set("poa_images_per_second", images / seconds)
        values.set("poa_model_flops_utilization_ratio", utilization)
        fields: dict[str, float] = {
            "mfu": utilization,
            "slowest_rank": slowest,
            "slowest_rank_seconds": shares[slowest].busy,
            "memory_bytes": max(list(share.memory.values())[-1] for share in shares),
        }
        for band, count, loss in zip(BANDS, interval.band_steps, interval.band_losses, strict=True):
            if count:
                values.set("poa_subnet_loss", loss / count, band)
                fields |= {f"subnet_loss_{band}": loss / count, f"subnet_steps_{band}": round(count)}
        for phase in PHASES:
            fields[f"{phase}_seconds_per_step"] = _mean(share.per_step[phase] for share in shares)
        return fields

    def _set_schedules(self, report: StepReport) -> None:
        values = self.values
        values.set("poa_learning_rate", report.values.lr)
        values.set("poa_weight_decay", report.values.weight_decay)
        values.set("poa_teacher_momentum", report.values.momentum)
        values.set("poa_teacher_temperature", report.values.teacher_temp)

    def _set_health(self, health: Health) -> dict[str, float]:
        values = self.values
        fields: dict[str, float] = {}
        for tokens, norm in health.center_norms.items():
            values.set("poa_center_norm", norm, tokens)
            fields[f"center_norm_{tokens}"] = norm
        for slot, branch in health.branches.items():
            values_by_name = {"entropy": branch.entropy, "effective_rank": branch.effective_rank}
            if slot in BANDS:
                values.set("poa_band_entropy_nats", branch.entropy, slot)
                values.set("poa_band_effective_rank", branch.effective_rank, slot)
                values.set("poa_band_feature_std", branch.deviation, slot)
            else:
                values.set("poa_target_entropy_nats", branch.entropy, slot)
                values.set("poa_target_uniform_kl_nats", branch.uniform_kl, slot)
                values.set("poa_prototypes_used_ratio", branch.used, slot)
                values.set("poa_effective_rank", branch.effective_rank, slot)
                values.set("poa_feature_std", branch.deviation, slot)
                values_by_name |= {"uniform_kl": branch.uniform_kl, "prototypes_used": branch.used}
            values_by_name["feature_std"] = branch.deviation
            fields |= {f"{name}_{slot}": value for name, value in values_by_name.items()}
        return fields


def _total(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Sums by name."""
    return sum(map(Counter, counts), Counter())


def _mean(numbers: "Iterator[float] | list[float]") -> float:
    held = list(numbers)
    return sum(held) / len(held)
