"""The panels of every dashboard, once: Grafana's JSON and the page of `poa watch` are made from this list."""

from dataclasses import dataclass
from typing import Literal

RUN = '{run="$run"}'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """One PromQL expression; `legend` may hold {{label}}."""

    legend: str
    expr: str


@dataclass(frozen=True)
class Panel:
    """One chart or one number.

    Attributes:
        title: short.
        unit: in Grafana's terms.
        queries: what it shows.
        kind: "stat" shows the last value, "timeseries" a chart, "stacked" a chart of parts of a whole.
        help: what to look for.
        floor_zero: the axis begins at zero.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["stat", "timeseries", "stacked"] = "timeseries"
    help: str = ""
    floor_zero: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    panels: tuple[Panel, ...]


def _stat(title: str, unit: str, expr: str, help: str = "") -> Panel:
    return Panel(title, unit, (Query(title, expr),), "stat", help)


def _sum_by(label: str, name: str, window: str = RATE) -> str:
    return f"sum by ({label}) (rate({name}{RUN}{window}))"


_BUCKETS = _sum_by("le", "poa_step_seconds_bucket")
_PER_STEP = f"sum(rate(poa_step_seconds_count{RUN}{RATE}))"
_LOOKED_UP = f"rate(poa_cache_hits_total{RUN}[5m]) + rate(poa_cache_misses_total{RUN}[5m])"
_ETA = (
    f"(max(poa_last_step{RUN}) - max(poa_step{RUN})) "
    f"* sum(rate(poa_step_seconds_sum{RUN}{RATE})) / sum(rate(poa_step_seconds_count{RUN}{RATE}))"
)

SECTIONS = (
    Section(
        "Overview",
        (
            _stat("Step", "none", f"max(poa_step{RUN})"),
            _stat("Of the run", "percentunit", f"max(poa_step{RUN}) / max(poa_last_step{RUN})"),
            _stat("Time left", "s", _ETA, "At the present speed, checkpoints left out."),
            _stat("Images/s", "none", f"sum(rate(poa_images_total{RUN}{RATE}))"),
            _stat("Loss", "none", 'max(poa_loss{run="$run",term="total"})'),
            _stat("Waiting for data", "percentunit", f"avg(poa_data_wait_ratio{RUN})"),
            _stat(
                "Utilization", "percentunit", f"max(poa_model_flops_utilization_ratio{RUN})", "Model FLOPs over peak."
            ),
            _stat("Bad steps", "none", f"sum(poa_bad_steps_total{RUN})", "Since the process started."),
            _stat("Checkpoint age", "s", f"time() - max(poa_checkpoint_timestamp_seconds{RUN})"),
            _stat("Restarts", "none", f"max(poa_restarts_total{RUN})"),
        ),
    ),
    Section(
        "Throughput and time",
        (
            Panel(
                "Throughput", "none", (Query("images/s", f"sum(rate(poa_images_total{RUN}{RATE}))"),), floor_zero=True
            ),
            Panel(
                "Step time",
                "s",
                (
                    Query("median", f"histogram_quantile(0.5, {_BUCKETS})"),
                    Query("99th percentile", f"histogram_quantile(0.99, {_BUCKETS})"),
                ),
                floor_zero=True,
            ),
            Panel(
                "Time per step by phase",
                "s",
                (Query("{{phase}}", f"{_sum_by('phase', 'poa_phase_seconds_total')} / scalar({_PER_STEP})"),),
                "stacked",
                "reduce is waiting for the slowest rank; data_wait above a tenth starves the devices.",
            ),
            Panel(
                "Own work of the ranks",
                "s",
                (
                    Query("{{stat}}", f"poa_rank_busy_seconds{RUN}"),
                    Query("slowest", f"poa_slowest_rank_step_seconds{RUN}"),
                ),
                help="A gap between max and mean is time that the other ranks wait.",
                floor_zero=True,
            ),
            Panel(
                "Model FLOPs utilization",
                "percentunit",
                (Query("utilization", f"poa_model_flops_utilization_ratio{RUN}"),),
                floor_zero=True,
            ),
            Panel(
                "Memory of the fullest device",
                "bytes",
                (Query("{{kind}}", f"max by (kind) (poa_device_memory_bytes{RUN})"),),
                floor_zero=True,
            ),
        ),
    ),
    Section(
        "Losses and optimisation",
        (
            Panel("Total loss", "none", (Query("total", 'poa_loss{run="$run",term="total"}'),)),
            Panel("DINO", "none", (Query("{{branch}}", 'poa_loss{run="$run",term="dino"}'),)),
            Panel("iBOT", "none", (Query("{{branch}}", 'poa_loss{run="$run",term="ibot"}'),)),
            Panel("Intact to elastic", "none", (Query("{{term}}", 'poa_loss{run="$run",term=~"distill.*"}'),)),
            Panel("KoLeo", "none", (Query("{{branch}}", 'poa_loss{run="$run",term="koleo"}'),)),
            Panel("Gradient norm", "none", (Query("{{module}}", f"poa_grad_norm{RUN}"),), floor_zero=True),
            Panel("Learning rate", "none", (Query("learning rate", f"poa_learning_rate{RUN}"),), floor_zero=True),
            Panel(
                "Temperatures",
                "none",
                (
                    Query("teacher", f"poa_teacher_temperature{RUN}"),
                    Query("student", f"poa_student_temperature{RUN}"),
                ),
            ),
            Panel("Teacher momentum", "none", (Query("momentum", f"poa_teacher_momentum{RUN}"),)),
        ),
    ),
    Section(
        "Health of the representation",
        (
            Panel(
                "Entropy of the mean target",
                "none",
                (
                    Query("{{branch}}", f"poa_target_entropy_nats{RUN}"),
                    Query("largest possible", f"poa_target_entropy_max_nats{RUN}"),
                ),
                help="Falls when all images get the same prototypes. Sinkhorn keeps the teacher's at the largest.",
                floor_zero=True,
            ),
            Panel(
                "Targets from uniform (KL)",
                "none",
                (Query("{{branch}}", f"poa_target_uniform_kl_nats{RUN}"),),
                help="Near zero: targets say nothing, the other way to collapse.",
                floor_zero=True,
            ),
            Panel(
                "Effective rank of cls features",
                "none",
                (Query("{{branch}}", f"poa_effective_rank{RUN}"),),
                help="One: all features point the same way.",
                floor_zero=True,
            ),
            Panel(
                "Spread of cls features",
                "none",
                (Query("{{branch}}", f"poa_feature_std{RUN}"),),
                help="Zero: all images look alike to the network.",
                floor_zero=True,
            ),
            Panel(
                "Prototypes in use",
                "percentunit",
                (Query("{{branch}}", f"poa_prototypes_used_ratio{RUN}"),),
                floor_zero=True,
            ),
            Panel("Norm of the centers", "none", (Query("{{tokens}}", f"poa_center_norm{RUN}"),), floor_zero=True),
        ),
    ),
    Section(
        "Sub-networks",
        (
            Panel(
                "Elastic DINO loss by cost",
                "none",
                (Query("{{band}}", f"poa_subnet_loss{RUN}"),),
                help="q1 holds the cheapest quarter of the draws.",
            ),
            Panel(
                "Elastic students trained by cost",
                "none",
                (Query("{{band}}", _sum_by("band", "poa_subnet_steps_total")),),
                "stacked",
                "Per second, over all ranks.",
            ),
            Panel(
                "Effective rank by cost",
                "none",
                (Query("{{band}}", f"poa_band_effective_rank{RUN}"),),
                floor_zero=True,
            ),
            Panel("Spread by cost", "none", (Query("{{band}}", f"poa_band_feature_std{RUN}"),), floor_zero=True),
            Panel(
                "k-NN accuracy",
                "percentunit",
                (Query("{{subnet}}", f"poa_knn_accuracy_ratio{RUN}"),),
                help="Measured during training every eval.every_steps.",
            ),
        ),
    ),
    Section(
        "Data",
        (
            Panel(
                "Waiting for data",
                "percentunit",
                (
                    Query("{{node}}", f"poa_data_wait_ratio{RUN}"),
                    Query("run, 5 minutes", f"run:poa_data_wait:ratio5m{RUN}"),
                ),
                floor_zero=True,
            ),
            Panel(
                "Samples left out",
                "none",
                (Query("{{reason}}", f"sum by (reason) (poa_skipped_samples_total{RUN})"),),
                help="Since the process started; skipped.jsonl of the run names them.",
                floor_zero=True,
            ),
            Panel(
                "Batches made apart",
                "none",
                (Query("{{reason}}", f"sum by (reason) (poa_batches_apart_total{RUN})"),),
                help="On the CPU while the other ranks wait: too many pixels for the device, or one did not decode.",
                floor_zero=True,
            ),
            Panel("Wait of the ranks", "s", (Query("{{stat}}", f"poa_rank_data_wait_seconds{RUN}"),), floor_zero=True),
            Panel(
                "Samples by source",
                "none",
                (Query("{{source}}", f"sum by (source) (poa_source_samples_total{RUN})"),),
                help="Trained on since the process started; their ratio is that of the weights.",
                floor_zero=True,
            ),
            Panel(
                "Read from stores",
                "Bps",
                (Query("{{source}}", f"sum by (source) (rate(poa_fetched_bytes_total{RUN}[5m]))"),),
                help="Bytes over all nodes, of samples and of what is kept on their disks.",
                floor_zero=True,
            ),
            Panel(
                "Found in the node's cache",
                "percentunit",
                (
                    Query("{{node}}", f"rate(poa_cache_hits_total{RUN}[5m]) / ({_LOOKED_UP})"),
                    Query("run, 15 minutes", f"1 - run:poa_cache_misses:ratio15m{RUN}"),
                ),
                help="Samples of stores that lay on the node's disk when they were read; the rest is read one by one.",
                floor_zero=True,
            ),
            Panel(
                "Reads tried again",
                "ops",
                (Query("{{reason}}", f"sum by (reason) (rate(poa_fetch_retries_total{RUN}[5m]))"),),
                help="Weather: it makes a run wait, and changes nothing else.",
                floor_zero=True,
            ),
            Panel(
                "Reads in flight",
                "none",
                (Query("{{node}}", f"rate(poa_fetch_wait_seconds_total{RUN}[5m])"),),
                help="Seconds that samples waited for stores per second; a rank has at most 32 at once.",
                floor_zero=True,
            ),
        ),
    ),
    Section(
        "Checkpoints and faults",
        (
            Panel(
                "Steps since the last checkpoint",
                "none",
                (
                    Query("steps", f"max(poa_step{RUN}) - max(poa_checkpoint_step{RUN})"),
                    Query("planned", f"max(poa_checkpoint_every_steps{RUN})"),
                ),
                floor_zero=True,
            ),
            Panel("Checkpoint time", "s", (Query("seconds", f"poa_checkpoint_seconds{RUN}"),), floor_zero=True),
            Panel("Checkpoint size", "bytes", (Query("bytes", f"poa_checkpoint_bytes{RUN}"),), floor_zero=True),
            Panel(
                "Steps left out",
                "none",
                (Query("{{term}}", f"sum by (term) (poa_bad_steps_total{RUN})"),),
                help="By the value that was not finite, since the process started.",
                floor_zero=True,
            ),
            Panel("Nodes that answer", "none", (Query("nodes", 'sum(up{job="poa",run="$run"})'),), floor_zero=True),
            Panel(
                "Seconds since the last step",
                "s",
                (Query("{{node}}", f"time() - poa_step_timestamp_seconds{RUN}"),),
                floor_zero=True,
            ),
        ),
    ),
)


def _of_job(metric: str) -> str:
    """A series of the site's exporter by the number of the Slurm job that the run is.

    Prometheus renames our label `job`, since it has one of its own.
    """
    job = f'label_replace(poa_run_info{RUN}, "hpc_job", "$1", "exported_job", "(.+)")'
    return f"{metric} * on (hpc_job) group_left () max by (hpc_job) ({job})"


def _per_gpu(title: str, unit: str, metric: str, scale: str = "", help: str = "") -> Panel:
    return Panel(title, unit, (Query("{{Hostname}} {{gpu}}", _of_job(metric) + scale),), help=help, floor_zero=True)


SITE = Section(
    "GPUs, as the site's DCGM exporter sees them",
    (
        _per_gpu(
            "Tensor cores busy",
            "percentunit",
            "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
            help="Share of the time. Empty where the site has no dcgm-exporter with its mapping of jobs.",
        ),
        _per_gpu("GPU busy", "percentunit", "DCGM_FI_DEV_GPU_UTIL", " / 100"),
        _per_gpu("GPU memory in use", "bytes", "DCGM_FI_DEV_FB_USED", " * 1048576"),
        _per_gpu("GPU power", "watt", "DCGM_FI_DEV_POWER_USAGE"),
        _per_gpu("GPU temperature", "celsius", "DCGM_FI_DEV_GPU_TEMP"),
    ),
)
"""Of Grafana's dashboard alone: another exporter's metrics, joined by the number of the job (its label `hpc_job`)."""


def expressions() -> list[tuple[str, str]]:
    """(panel, expression) of all panels."""
    return [(p.title, q.expr) for section in SECTIONS for p in section.panels for q in p.queries]
