"""What it took to train one network of a run: how often it was drawn, its part of the GPU-hours, and training it alone.

Counts are exact: which network a rank draws at a step is a pure function, which is asked again. FLOPs are those of
`elastic.cost`, from which `poa plan` forecasts. Hours come from the times in the run's records.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import ExperimentConfig
from pipeline.elastic import Grid, Subnet, cost
from pipeline.elastic.sampling import SubnetSampler
from pipeline.errors import UserError
from pipeline.files import read_json, read_json_lines


class Stretch(NamedTuple):
    """Steps `[begin, end)` that as many ranks have trained, each on `batch` images a step."""

    begin: int
    end: int
    ranks: int
    batch: int


class Account(NamedTuple):
    """Of one network.

    Attributes:
        steps: of the run, without those of one that it was forked from.
        images: that the run saw in them.
        draws: how often it was the elastic student of a rank; 0 for the largest, which is the intact student instead.
        own_images: that it saw, as elastic or as intact student.
        gpu_hours: of the run, all ranks; None if its records do not tell.
        share: of the run's FLOPs, in passes of this very network. The teacher's are the largest network's.
        alone: FLOPs of training it by itself, teacher included, on all of the run's images, as a multiple of the run's.
        before: steps of the run that this one was forked from, which are in no number here.
    """

    steps: int
    images: int
    draws: int
    own_images: int
    gpu_hours: float | None
    share: float
    alone: float
    before: int

    @property
    def own_hours(self) -> float | None:
        return None if self.gpu_hours is None else self.gpu_hours * self.share

    @property
    def alone_hours(self) -> float | None:
        """At the FLOP/s that the run had."""
        return None if self.gpu_hours is None else self.gpu_hours * self.alone

    def as_json(self) -> dict[str, Any]:
        return self._asdict() | {"own_gpu_hours": self.own_hours, "alone_gpu_hours": self.alone_hours}


class Ledger:
    """The past of a run up to a step.

    Args:
        run_dir: its directory.
        config: of the run.
        step: of the checkpoint that is asked about.

    Attributes:
        stretches: its steps; none if its manifest does not tell.
    """

    def __init__(self, run_dir: Path, config: ExperimentConfig, step: int):
        self.config, self.grid = config, Grid(config.model, config.sampling.small_bias)
        starts, global_batch = _starts(run_dir)
        self.stretches = stretches(starts, step, global_batch, config)
        self.before = self.stretches[0].begin if self.stretches else step
        self.gpu_hours = _gpu_hours(run_dir, starts, step)
        self._draws = self._count()
        steps = {subnet: cost.step_flops(config, subnet) for subnet in self._draws}
        fixed = cost.step_flops(config, None)
        turns = sum((s.end - s.begin) * s.ranks * s.batch for s in self.stretches) / config.data.batch_size
        self._largest = turns * (fixed.teacher + fixed.intact)
        self._elastic = {s: self._images[s] / config.data.batch_size * steps[s].elastic for s in self._draws}
        self._turns = turns

    @property
    def flops(self) -> float:
        return self._largest + sum(self._elastic.values())

    def of(self, subnet: Subnet) -> Account:
        """The account of one network."""
        images = sum((s.end - s.begin) * s.ranks * s.batch for s in self.stretches)
        largest = subnet == self.grid.largest
        spent = self._largest if largest else self._elastic.get(subnet, 0.0)
        alone = self.config.model_copy(
            update={"model": self.config.model.alone(subnet.width, subnet.depths, subnet.mlp_ratio)}
        )
        by_itself = cost.step_flops(alone, None)
        total = max(self.flops, 1e-30)
        return Account(
            steps=sum(s.end - s.begin for s in self.stretches),
            images=images,
            draws=0 if largest else self._draws[subnet],
            own_images=images if largest else self._images[subnet],
            gpu_hours=self.gpu_hours,
            share=spent / total,
            alone=self._turns * (by_itself.teacher + by_itself.intact) / total,
            before=self.before,
        )

    def _count(self) -> Counter[Subnet]:
        draws: Counter[Subnet] = Counter()
        self._images: Counter[Subnet] = Counter()
        for stretch in self.stretches:
            sampling = self.config.sampling
            flops = partial(cost.flops, self.config.model)
            sampler = SubnetSampler(self.grid, flops, stretch.ranks, sampling.assignment, self.config.data.seed)
            for subnet, count in sampler.counts(stretch.begin, stretch.end).items():
                draws[subnet] += count
                self._images[subnet] += count * stretch.batch
        return draws


def stretches(
    starts: Sequence[dict[str, Any]], step: int, global_batch: int | None, config: ExperimentConfig
) -> list[Stretch]:
    """The steps up to `step` by the ranks that made them; a start takes back what lies after it."""
    found: list[Stretch] = []
    for i, start in enumerate(starts):
        later = [other["step"] for other in starts[i + 1 :]]
        end = min([step, *later])
        ranks = start["world_size"]
        if start["step"] < end:
            batch = global_batch // ranks if global_batch else config.data.batch_size
            found.append(Stretch(start["step"], end, ranks, batch))
    return found


def _starts(run_dir: Path) -> tuple[list[dict[str, Any]], int | None]:
    """When, where and by how many ranks the run was started, and its images per step; what cannot be read costs an
    account, and neither an extraction nor a report."""
    try:
        manifest = read_json(run_dir / "manifest.json", "restore it")
        starts = [
            {"step": int(start["step"]), "world_size": int(start["world_size"]), "time": str(start["time"])}
            for start in manifest["starts"]
        ]
        return starts, int(manifest["global_batch"]) if "global_batch" in manifest else None
    except (OSError, UserError, KeyError, TypeError, ValueError) as error:
        print(f"warning: what the run took is not known: {type(error).__name__} in its manifest.json", file=sys.stderr)
        return [], None


def _gpu_hours(run_dir: Path, starts: Sequence[dict[str, Any]], step: int) -> float | None:
    """Rank-hours of the steps whose records are there, from line to line. What lies between two starts of the job is
    the time of nobody; steps before the first line of a start are taken at the pace of that line."""
    wanted = {"time", "step_seconds"}
    try:
        lines = [line for line in read_json_lines(run_dir / "metrics.jsonl", "step") if wanted <= set(line)]
        times = [datetime.fromisoformat(start["time"]).timestamp() for start in starts]
    except (OSError, UserError, KeyError, ValueError):
        return None
    lines = [line for line in lines if line["step"] <= step]
    if not lines or not starts:
        return None
    seconds, before = 0.0, {"step": starts[0]["step"], "time": -1.0}
    for line in lines:
        begun = max((t for t in times if t <= line["time"]), default=times[0])
        ranks = starts[times.index(begun)]["world_size"]
        gone = line["step"] - before["step"]
        whole = before["time"] >= begun
        seconds += ranks * (line["time"] - before["time"] if whole else gone * line["step_seconds"])
        before = line
    return seconds / 3600
