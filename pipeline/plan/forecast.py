"""What a run costs on N GPUs, on paper: stragglers, communication, time, data. No torch, no GPU, and no network unless
the data is in a store."""

from functools import partial
from math import ceil, gcd, sqrt
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import ExperimentConfig
from pipeline.elastic import cost
from pipeline.elastic.sampling import ASSIGNMENTS, SubnetSampler
from pipeline.elastic.subnet import Grid
from pipeline.errors import UserError
from pipeline.plan.memory import RANKS_PER_NODE, shard_ranks, under


class Gpu(NamedTuple):
    """FLOP/s of the data sheet, and usable bytes.

    Attributes:
        flops: dense bf16, on the matrix units.
        fp32_flops: of full fp32: TF32, which would bring it to the matrix units, is never switched on.
        memory: usable bytes.
    """

    flops: float
    fp32_flops: float
    memory: float

    def peak(self, precision: str) -> float:
        """FLOP/s at `engine.precision`."""
        return self.flops if precision == "bf16" else self.fp32_flops


GPUS = {
    "h200": Gpu(989.4e12, 66.9e12, 139 * 2**30),
    "h100": Gpu(989.4e12, 66.9e12, 78 * 2**30),
    "a100": Gpu(311.8e12, 19.5e12, 78 * 2**30),
}


def sampler(config: ExperimentConfig, ranks: int, assignment: str | None = None) -> SubnetSampler:
    """The sampler that a run with so many ranks uses."""
    grid = Grid(config.model, config.sampling.small_bias)
    forward = partial(cost.flops, config.model)
    return SubnetSampler(grid, forward, ranks, assignment or config.sampling.assignment, config.data.seed)


def expected_slowest(costs: list[float], ranks: int, assignment: str) -> float:
    """Exact expectation of the largest cost among the ranks of a step.

    Args:
        costs: of the entries of the sampling law, in the sampler's order.
        ranks: how many draw.
        assignment: as in `SubnetSampler`: `independent` ranks draw uniformly, each by itself; `balanced` ones share a
            group of neighbours, all groups alike; `shared` ones have one draw.
    """
    n = len(costs)
    if assignment == "shared":
        return sum(costs) / n
    if assignment == "independent":
        # P(largest <= k-th) = (k / n)^ranks
        ordered = sorted(costs)
        return sum(c * ((k / n) ** ranks - ((k - 1) / n) ** ranks) for k, c in enumerate(ordered, 1))
    if ranks >= 2 * n:  # every group holds every entry
        return max(costs)
    snake = [*costs, *reversed(costs)]
    groups = n // gcd(n, ranks)
    return sum(max(snake[(g * ranks + i) % (2 * n)] for i in range(ranks)) for g in range(groups)) / groups


def stragglers(config: ExperimentConfig, ranks: int) -> dict[str, dict[str, float]]:
    """Per assignment: FLOPs of the elastic student of the slowest rank and of the mean one, and how much longer the
    step takes than if no rank waited. Without elastic students there is one assignment, and nothing to wait for."""
    if config.sampling.alone:
        return {config.sampling.assignment: {"mean": 0.0, "slowest": 0.0, "slowdown": 0.0}}
    entries = sampler(config, ranks).entries
    steps = {subnet: cost.step_flops(config, subnet) for subnet in set(entries)}
    costs = [steps[subnet].elastic for subnet in entries]
    mean = sum(costs) / len(costs)
    fixed = steps[entries[0]].teacher + steps[entries[0]].intact
    out = {}
    for assignment in ASSIGNMENTS:
        slowest = expected_slowest(costs, ranks, assignment)
        out[assignment] = {"mean": mean, "slowest": slowest, "slowdown": (fixed + slowest) / (fixed + mean) - 1}
    return out


def communication(config: ExperimentConfig, ranks: int, stage: int | None = None) -> dict[str, float]:
    """Bytes that a GPU sends per step by the config's engine, or at a ZeRO stage.

    By ring algorithms: 2 n (R-1)/R to all-reduce n bytes, half of it to gather or to reduce and scatter. Gradients are
    in `engine.reduce_dtype`, weights in the working precision.
    """
    config = config if stage is None else under(config, zero_stage=stage)
    low = 2 if config.engine.precision == "bf16" else 4
    reduced = 2 if config.engine.reduce_dtype == "bf16" else 4
    count = cost.trained_params(config).total
    shards = shard_ranks(config, ranks) if config.engine.backend == "fsdp2" else ranks
    share = (shards - 1) / shards
    scattered, students, teachers = _passes(config, count)
    # Sinkhorn: 3 iterations, cls and patches, one fp64 sum per prototype; centering: one
    rounds = {"sinkhorn": 3, "softmax": 1, "none": 0}[config.loss.centering]
    return {
        "gradients": 1.0 * scattered * reduced * count * share,
        "gradients between replicas": 2.0 * reduced * (count / shards) * (1 - shards / ranks),
        "student weights": 1.0 * students * low * count * share,
        "teacher weights": 1.0 * teachers * low * count * share,
        "targets": 2.0 * (ranks - 1) / ranks * rounds * 2 * 8 * sum(config.heads.prototypes),
    }


def _passes(config: ExperimentConfig, count: int) -> tuple[int, int, int]:
    """How often in a step gradients are scattered, and how often the weights of student and teacher are gathered."""
    engine = config.engine
    every_pass = engine.reshards(count) if engine.backend == "fsdp2" else engine.effective_stage() == 3
    passes = 1 if config.sampling.alone else 2
    if every_pass:  # forward and backward pass of each student, forward pass of the teacher
        return passes, 2 * passes, 1
    if engine.backend == "fsdp2":
        return 1, 1, 1
    stage = engine.effective_stage()  # at stage 0 an all-reduce, once; at stage 2 after each student's pass
    return {0: 2, 1: 1}.get(stage, passes), min(stage, 1), min(stage, 1)


def data(config: ExperimentConfig, ranks: int) -> dict[str, Any]:
    """Batches, epochs and shards; `samples` is None where the shards are not at hand."""
    from braceexpand import braceexpand

    from pipeline.data.patterns import patterns_of

    shards = [Path(name) for pattern in patterns_of(config.data.train) for name in braceexpand(pattern)]
    batch = config.data.batch_size * ranks
    per_epoch = batch * config.optim.steps_per_epoch
    samples = _samples(shards)
    return {
        "global_batch": batch,
        "peak_lr": config.optim.base_lr * sqrt(batch / 1024),
        "images_per_epoch": per_epoch,
        "images_in_all": batch * config.optim.total_steps,
        "shards": len(shards),
        "samples": samples,
        "passes_per_epoch": per_epoch / samples if samples else None,
        "passes_in_all": batch * config.optim.total_steps / samples if samples else None,
    }


def store(config: ExperimentConfig, ranks: int) -> dict[str, Any] | None:
    """What a node fetches from stores and keeps; None if all shards are on disks. Bytes are None where the catalogs
    cannot be read within some seconds."""
    from pipeline.data.order import share_of_node
    from pipeline.data.patterns import patterns_of
    from pipeline.data.reader import Dataset
    from pipeline.data.remote.patience import WEATHER

    if not any("://" in pattern for pattern in patterns_of(config.data.train)):
        return None
    nodes, cache = ceil(ranks / RANKS_PER_NODE), config.data.cache
    whole, single = share_of_node(nodes, config.data.lanes, keeps=cache.folder is not None)
    try:
        with WEATHER.for_a_look():
            total = Dataset(config.data.train).remote_bytes
    except UserError:
        total = None
    return {
        "nodes": nodes,
        "lanes": config.data.lanes,
        "share_in_pieces": whole,
        "share_by_sample": single,
        "bytes": total,
        "bytes_per_node_and_epoch": None if total is None else (whole + single) * total,
        "cache_folder": cache.folder,
        "cache_bytes": cache.gb * 1e9 if cache.folder else 0,
    }


def _samples(shards: list[Path]) -> int | None:
    from pipeline.data.catalog import open_catalog
    from pipeline.data.indexes import has_index, read_index

    try:
        catalogs = {folder: open_catalog(folder) for folder in {shard.parent for shard in shards}}
        total = 0
        for shard in shards:
            listing = catalogs[shard.parent]
            number = listing.number(shard.name) if listing else None
            if listing is not None and number is not None:
                total += int(listing.samples[number])
            elif has_index(shard):
                total += sum(1 for sample in read_index(shard) if sample.image)
            else:
                return None
        return total
    except (OSError, UserError):
        return None


def speed(config: ExperimentConfig, ranks: int, gpu: Gpu, utilization: float) -> dict[str, float]:
    """Time of a step and of the run if the slowest rank computes at `utilization` of the peak."""
    peak = gpu.peak(config.engine.precision)
    step = cost.step_flops(config, Grid(config.model).smallest)
    slowest = stragglers(config, ranks)[config.sampling.assignment]["slowest"]
    seconds = (step.teacher + step.intact + slowest) / (peak * utilization)
    images = config.data.batch_size * ranks
    days = seconds * config.optim.total_steps / 86400
    return {
        "step_seconds": seconds,
        "images_per_second": images / seconds,
        "images_per_second_per_gpu": config.data.batch_size / seconds,
        "days": days,
        "gpu_hours": days * 24 * ranks,
    }
