"""Every metric a run exports: name, kind, labels, help. Base units; no label per rank or per sub-network drawn."""

from dataclasses import dataclass
from typing import Literal

PHASES = ("data_wait", "teacher", "intact", "elastic", "backward", "reduce", "optimizer", "ema", "checkpoint")
"""Parts of a step; `reduce` is waiting for the other ranks in gradient reduction and agreement."""

BUSY_PHASES = ("data_wait", "intact", "elastic", "backward")
"""Phases in which a rank works on its own, so that their sum tells a slow rank from those that wait for it."""

BANDS = ("q1", "q2", "q3", "q4")
"""Quarters of the sub-networks drawn, from the cheapest in FLOPs to the dearest."""

STEP_BUCKETS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 120.0)


@dataclass(frozen=True)
class Family:
    """One metric.

    Attributes:
        name: as exposed, with `_total` for a counter.
        kind: how Prometheus should read it.
        help: one line, with the unit if there is one.
        labels: in order.
        everywhere: exported by every node about its own ranks; otherwise by rank 0's node about the whole run.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    everywhere: bool = False


def _gauge(name: str, help: str, *labels: str, everywhere: bool = False) -> Family:
    return Family(name, "gauge", help, labels, everywhere)


def _counter(name: str, help: str, *labels: str, everywhere: bool = False) -> Family:
    return Family(name, "counter", help, labels, everywhere)


_NODE = (
    _counter("poa_images_total", "Images trained on since the process started", everywhere=True),
    _gauge("poa_step", "Completed steps of the run", everywhere=True),
    _gauge(
        "poa_step_timestamp_seconds",
        "When the last step, or a batch of an evaluation, ended, Unix time",
        everywhere=True,
    ),
    Family("poa_step_seconds", "histogram", "Wall time of a step", everywhere=True),
    _counter(
        "poa_phase_seconds_total", "Time per part of the step, mean of the node's ranks", "phase", everywhere=True
    ),
    _gauge("poa_data_wait_ratio", "Share of the step spent waiting for data, mean of its ranks", everywhere=True),
    _counter("poa_fetched_bytes_total", "Bytes read from stores", "source", everywhere=True),
    _counter("poa_fetch_retries_total", "Reads from stores and disks that were tried again", "reason", everywhere=True),
    _counter("poa_fetch_wait_seconds_total", "Time that samples waited for stores, over all threads", everywhere=True),
    _counter("poa_cache_hits_total", "Samples of stores that the node's cache had", everywhere=True),
    _counter("poa_cache_misses_total", "Samples that it had not, read from stores one by one", everywhere=True),
    _gauge("poa_device_memory_bytes", "Memory of the fullest device (or process)", "kind", everywhere=True),
)
_PROGRESS = (
    _gauge("poa_images_per_second", "Images per second over all ranks"),
    _gauge("poa_model_flops_utilization_ratio", "FLOPs of the networks really trained over the peak of the devices"),
    _gauge("poa_device_peak_flops", "Peak FLOP/s of one device that utilization is measured against", "source"),
    _gauge("poa_epoch", "Epochs of the schedule completed"),
    _gauge("poa_samples", "Images seen since the run began, over all its starts"),
    _gauge("poa_last_step", "Step at which the run ends"),
    _gauge("poa_rank_busy_seconds", "Per step, a rank's own work without waiting for others", "stat"),
    _gauge("poa_rank_data_wait_seconds", "Per step, a rank's wait for data", "stat"),
    _gauge("poa_slowest_rank_step_seconds", "Own work per step of the rank that keeps the others waiting"),
    _gauge("poa_slowest_rank", "Number of that rank"),
    _counter("poa_restarts_total", "Times the run was started again"),
    _gauge("poa_run_info", "Constant 1; the labels describe the run", "run", "family", "job", "world_size", "version"),
)
_OPTIMISATION = (
    _gauge("poa_loss", "Loss term before weighting, mean over ranks; term total is the weighted sum", "term", "branch"),
    _gauge("poa_grad_norm", "Gradient norm before clipping", "module"),
    _gauge("poa_learning_rate", "Learning rate before the multipliers of layers"),
    _gauge("poa_weight_decay", "Weight decay"),
    _gauge("poa_teacher_momentum", "Momentum of the teacher's moving average"),
    _gauge("poa_teacher_temperature", "Temperature of the teacher's targets"),
    _gauge("poa_student_temperature", "Temperature of the students' predictions"),
    _counter("poa_bad_steps_total", "Updates left out because a value was not finite", "term"),
    _counter("poa_subnet_steps_total", "Elastic students trained, counted over ranks, by cost", "band"),
    _gauge("poa_subnet_loss", "DINO loss of the elastic students since the last log line, by cost", "band"),
    _gauge("poa_band_gflops", "Dearest sub-network of the band, GFLOPs of one image", "band"),
)
_FAULTS = (
    _counter("poa_skipped_samples_total", "Samples left out and replaced", "reason"),
    _counter("poa_batches_apart_total", "Batches made on the CPU, not by the rank's own data pipeline", "reason"),
    _counter("poa_source_samples_total", "Samples trained on, by source of the data", "source"),
    _gauge("poa_checkpoint_seconds", "Time the last checkpoint took, most of it beside training"),
    _gauge("poa_checkpoint_timestamp_seconds", "When the last checkpoint was complete, Unix time"),
    _gauge("poa_checkpoint_bytes", "Size of the last checkpoint"),
    _gauge("poa_checkpoint_step", "Step of the last checkpoint"),
    _gauge("poa_checkpoint_every_steps", "Steps between checkpoints"),
)
_HEALTH = (
    _gauge("poa_target_entropy_nats", "Entropy of the mean target (students: prediction), mean of heads", "branch"),
    _gauge("poa_target_entropy_max_nats", "Largest possible entropy, log of the prototypes, mean over heads"),
    _gauge("poa_target_uniform_kl_nats", "KL divergence of single targets from uniform, mean of heads", "branch"),
    _gauge("poa_prototypes_used_ratio", "Share of prototypes with over a tenth of the uniform mass", "branch"),
    _gauge("poa_effective_rank", "Effective rank of the cls features (exp of the singular values' entropy)", "branch"),
    _gauge("poa_effective_rank_max", "Largest possible effective rank: global crops of a rank, or channels"),
    _gauge("poa_feature_std", "RMS distance of normalised cls features from their mean: 0 collapsed", "branch"),
    _gauge("poa_center_norm", "Norm of the centers of the teacher's logits, mean over heads", "tokens"),
    _gauge("poa_band_entropy_nats", "As poa_target_entropy_nats, elastic students by cost", "band"),
    _gauge("poa_band_effective_rank", "As poa_effective_rank, elastic students by cost", "band"),
    _gauge("poa_band_feature_std", "As poa_feature_std, elastic students by cost", "band"),
    _gauge("poa_knn_accuracy_ratio", "20-NN accuracy on the validation shards, by evaluated sub-network", "subnet"),
)
FAMILIES = {family.name: family for family in (*_NODE, *_PROGRESS, *_OPTIMISATION, *_FAULTS, *_HEALTH)}
