"""What a training step costs, by phase, alone or by turns with other engines or a plain implementation of it.

Nothing is measured that happens once: every width is compiled first. On a CPU processor time stands beside wall time,
since other work on the machine disturbs it less.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from pipeline.bench.plain import Plain
from pipeline.bench.synthetic import BenchTrainer, SyntheticLoader
from pipeline.config import ExperimentConfig, KernelsConfig
from pipeline.elastic import Subnet
from pipeline.engine import distributed
from pipeline.engine.distributed import Ranks
from pipeline.engine.layouts import working_dtype
from pipeline.errors import UserError
from pipeline.measure.metrics import PHASES
from pipeline.measure.phases import Phases
from pipeline.plan.memory import under
from pipeline.run.step import Underway, build_student

ENGINE = ("reduce", "optimizer", "ema")
"""Phases of what surrounds the networks: gradient reduction and norms, clip and AdamW, moving average."""

OTHERS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_stage": stage} for stage in range(4)},
    "fsdp2-keep": {"reshard_after_forward": False},
    "fsdp2-reshard": {"reshard_after_forward": True},
}
"""Engines that may make every step beside the config's own."""

_PROFILED = 2  # steps


class Laps(Phases):
    """Phases that also count this process's CPU time, in `cpu`."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.cpu = dict.fromkeys(PHASES, 0.0)
        self._cpu_mark = time.process_time()

    def start(self) -> None:
        super().start()
        self._cpu_mark = time.process_time()

    def waited_for_data(self) -> float:
        seconds = super().waited_for_data()
        self._count("data_wait")
        return seconds

    def lap(self, phase: str) -> None:
        super().lap(phase)
        self._count(phase)

    def _count(self, phase: str) -> None:
        now = time.process_time()
        self.cpu[phase] += now - self._cpu_mark
        self._cpu_mark = now


@dataclass(frozen=True)
class Cost:
    """Of one step: seconds of wall and of processor time, `engine` of them in the phases of `ENGINE`; peak bytes."""

    seconds: float
    cpu_seconds: float
    engine_seconds: float
    engine_cpu_seconds: float
    peak_bytes: int


@dataclass
class Contender:
    """One implementation of the step.

    Attributes:
        run: makes step n; returns its total loss and the FLOPs of all ranks.
        laps: by which it divides its time.
        costs, losses, flops: of the steps made.
        state_bytes: what it holds on the device between steps.
    """

    run: Callable[[int], tuple[float, float]]
    laps: Laps
    costs: list[Cost] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    state_bytes: int = 0

    def median(self, what: str, last: int) -> float:
        return statistics.median(getattr(cost, what) for cost in self.costs[-last:])


class StepBench:
    """Steps of one experiment by one or more contenders in turn; iBOT is on from the first step.

    Args:
        config: the experiment; nothing is written.
        ranks: this process and its peers.
        synthetic: no shards and no DALI.
    """

    def __init__(self, config: ExperimentConfig, ranks: Ranks, synthetic: bool):
        self.config = config.model_copy(update={"loss": config.loss.model_copy(update={"ibot_start_epoch": 0})})
        self.ranks, self.step = ranks, 0
        self._trainers: list[BenchTrainer] = []
        self.ours = self._add_trainer(self.config, synthetic)
        self.trainer = self._trainers[0]
        self.contenders = {"ours": self.ours}

    def _add_trainer(self, config: ExperimentConfig, synthetic: bool) -> Contender:
        before = self._held()
        trainer = BenchTrainer(config, self.ranks, synthetic)
        trainer.start_data(0)
        trainer.phases = laps = Laps(self.ranks.device)
        trainer.tri_branch.lap = laps.lap
        self._trainers.append(trainer)
        last: list[Underway] = []

        def run(number: int) -> tuple[float, float]:
            last.append(trainer.step(number))
            agreed = last[0].report.agreed  # read one step late, as in training
            del last[:-1]
            return agreed.losses["total"], agreed.flops

        return Contender(run, laps, state_bytes=self._held() - before)

    def add_engine(self, name: str) -> None:
        """Let another engine make every further step too.

        Args:
            name: a key of `OTHERS`.
        """
        self.contenders[name] = self._add_trainer(under(self.config, **OTHERS[name]), self.trainer.synthetic)

    def add_plain(self, compiled: bool) -> None:
        """Let the plain implementation make every further step too; from the weights of the start, as ours.

        Args:
            compiled: its blocks, like ours.

        Raises:
            UserError: there are several ranks, or batches that cannot be had twice.
        """
        if self.ranks.world_size > 1 or not self.trainer.synthetic:
            raise UserError("the plain step is one process on synthetic data", "--against", "add --synthetic, one rank")
        before = self._held()
        self.contenders["plain"] = plain = _plain(self.trainer, self.config, compiled)
        plain.state_bytes = self._held() - before

    def drop_plain(self) -> None:
        self.contenders.pop("plain", None)
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def warm(self, subnets: Iterable[Subnet | None]) -> None:
        """Make steps that are not measured."""
        for subnet in subnets:
            self._turn(subnet)

    def widths(self) -> list[Subnet]:
        """A sub-network of every width and MLP ratio, the shallowest; none where nothing is compiled."""
        grid = self.trainer.grid
        if not self.config.engine.compile and not self.config.uses_triton():
            return []
        return grid.of_every_shape(grid.smallest.depths)

    def measure(self, subnets: Sequence[Subnet | None]) -> dict[str, Any]:
        """Make a step of each sub-network; figures of these steps."""
        before, cpu_before = dict(self.ours.laps.seconds), dict(self.ours.laps.cpu)
        # on a GPU alone, steps follow one another without waiting: the device, not the host, says how long one took
        marks = [self._mark()] if len(self.contenders) == 1 and self.ranks.device.type == "cuda" else []
        for subnet in subnets:
            self._turn(subnet)
            marks += [self._mark()] if marks else []
        self._wait()
        self.ours.laps.start()  # adds up the laps that were pending
        count = len(subnets)
        seconds = [cost.seconds for cost in self.ours.costs[-count:]]
        if marks:
            seconds = [began.elapsed_time(ended) / 1000 for began, ended in pairwise(marks)]
        low, median, high = statistics.quantiles(seconds, n=4) if count > 1 else seconds * 3
        flops = statistics.fmean(self.ours.flops[-count:]) / self.ranks.world_size
        result: dict[str, Any] = {
            "images_per_second": self.trainer.global_batch / median,
            "step_seconds": {"quartile_1": low, "median": median, "quartile_3": high},
            "cpu_seconds": self.ours.median("cpu_seconds", count),
            "phase_seconds": _shares(before, self.ours.laps.seconds, count),
            "phase_cpu_seconds": _shares(cpu_before, self.ours.laps.cpu, count),
            "tflops_per_second_per_rank": flops / median / 1e12,
            "ranks": self.ranks.world_size,
            "global_batch": self.trainer.global_batch,
            "steps": count,
            "loss": self.ours.losses[-1],
        }
        if self.ranks.device.type == "cuda":
            result["peak_gib"] = max(cost.peak_bytes for cost in self.ours.costs[-count:]) / 2**30
        for name, other in self.contenders.items():
            if other is not self.ours:
                result[name] = self._against(name, other, count)
        return result

    def gpu_busy(self, subnet: Subnet | None = None) -> dict[str, Any] | None:
        """Share of two steps in which the GPU runs something, its kernels per step and the longest; None on a CPU."""
        if self.ranks.device.type != "cuda":
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
            self._wait()
            began = time.perf_counter()
            self.warm([subnet] * _PROFILED)
            self._wait()
            wall = time.perf_counter() - began
        kernels = [e for e in found.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
        totals = [(e.self_device_time_total, e.key) for e in found.key_averages() if e.self_device_time_total]
        return {
            "share": union([(e.time_range.start, e.time_range.end) for e in kernels]) / 1e6 / wall,
            "kernels_per_step": len(kernels) / _PROFILED,
            "longest_ms": {name[:120]: micros / 1e3 / _PROFILED for micros, name in sorted(totals, reverse=True)[:40]},
        }

    def close(self) -> None:
        for trainer in self._trainers:
            trainer.close()

    def _turn(self, subnet: Subnet | None) -> None:
        """One step by every contender."""
        for trainer in self._trainers:
            trainer.chosen = subnet
        for contender in self.contenders.values():
            contender.costs.append(self._cost(contender))
        self.step += 1

    def _cost(self, contender: Contender) -> Cost:
        cuda, alone = self.ranks.device.type == "cuda", len(self.contenders) == 1
        if cuda and not alone:
            self._wait()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        laps = contender.laps
        before, held = _engine(laps), self._held()
        wall, cpu = time.perf_counter(), time.process_time()
        loss, flops = contender.run(self.step)
        if not alone:
            self._wait()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        laps.start()
        if not contender.costs:
            contender.state_bytes += self._held() - held  # moments are made by the first step
        contender.losses.append(loss)
        contender.flops.append(flops)
        engine, engine_cpu = (after - then for after, then in zip(_engine(laps), before, strict=True))
        others = sum(other.state_bytes for other in self.contenders.values() if other is not contender)
        return Cost(wall, cpu, engine, engine_cpu, torch.cuda.max_memory_allocated() - others if cuda else 0)

    def _against(self, name: str, other: Contender, count: int) -> dict[str, Any]:
        """Another's medians, and ours as multiples of them, step by step."""
        kinds = ("seconds", "cpu_seconds", "engine_seconds", "engine_cpu_seconds")
        result: dict[str, Any] = {kind: other.median(kind, count) for kind in kinds}
        result["ours"] = {kind: self.ours.median(kind, count) for kind in kinds}
        pairs = list(zip(self.ours.costs[-count:], other.costs[-count:], strict=True))
        result[f"ours_over_{name}"] = {
            kind: statistics.median(getattr(a, kind) / max(getattr(b, kind), 1e-9) for a, b in pairs) for kind in kinds
        }
        result["first_losses"] = {"ours": self.ours.losses[0], name: other.losses[0]}
        if self.ranks.device.type == "cuda":
            result["peak_gib"] = max(cost.peak_bytes for cost in other.costs[-count:]) / 2**30
        return result

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self.ranks.device.type == "cuda" else 0


def benchmark_step(
    config: ExperimentConfig,
    steps: int,
    warmup: int,
    *,
    synthetic: bool = False,
    against: Sequence[str] = (),
    subnets: Sequence[str] = (),
) -> dict[str, Any]:
    """Time real training steps, on one rank or under torchrun.

    Args:
        config: the experiment; nothing is written.
        steps: measured steps.
        warmup: steps before them, after one of every width where something is compiled.
        synthetic: random pictures, no shards and no DALI.
        against: what makes every step beside ours: "plain", the plain implementation, and entries of `OTHERS`.
        subnets: names of the elastic students, by turns; those that training draws if there are none.

    Returns:
        Medians of the step: seconds, processor seconds, seconds by phase, images and FLOP per second; on a GPU its busy
        share and peak memory.

    Raises:
        UserError: see `BenchTrainer` and `StepBench.add_plain`; no such sub-network or engine.
    """
    choices = ("plain", *OTHERS)
    if unknown := [name for name in against if name not in choices]:
        raise UserError(f"there is no {unknown[0]!r} to compare with", "--against", f"choose of {', '.join(choices)}")
    ranks = distributed.initialize()
    bench = StepBench(config, ranks, synthetic)
    try:
        for name in against:
            bench.add_plain(config.engine.compile) if name == "plain" else bench.add_engine(name)
        chosen: list[Subnet | None] = [bench.trainer.grid.parse(name) for name in subnets] or [None]
        for subnet in bench.widths():
            if ranks.is_main:
                print(f"compiling width {subnet.width}", file=sys.stderr, flush=True)
            bench.warm([subnet])
        bench.warm(chosen[i % len(chosen)] for i in range(warmup))
        result = bench.measure([chosen[i % len(chosen)] for i in range(steps)])
        if busy := bench.gpu_busy(chosen[0]):
            result["gpu_busy"] = busy
        return result
    finally:
        bench.close()
        distributed.shut_down()


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what intervals cover together."""
    covered, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _plain(trainer: BenchTrainer, config: ExperimentConfig, compiled: bool) -> Contender:
    plain_config = under(config, zero_stage=0, kernels=KernelsConfig.of("eager"))
    student = build_student(plain_config)
    if compiled:
        student.backbone.compile_blocks()
    device, dtype = trainer.ranks.device, working_dtype(config.engine)
    laps = Laps(device)
    plain = Plain(plain_config, student, device, dtype, lap=laps.lap)
    loader = SyntheticLoader(config.data, config.model.in_chans, device=device)

    def run(number: int) -> tuple[float, float]:
        values = trainer.schedules.at(number)
        laps.start()
        batch = next(loader)
        laps.waited_for_data()
        inputs = trainer.plain_inputs(batch, number, values)
        return float(plain.step(number, values, inputs, [trainer.draw(number)])["total"]), 0.0

    return Contender(run, laps)


def _engine(laps: Laps) -> list[float]:
    return [sum(clock[phase] for phase in ENGINE) for clock in (laps.seconds, laps.cpu)]


def _shares(before: dict[str, float], after: dict[str, float], steps: int) -> dict[str, float]:
    return {phase: (after[phase] - before[phase]) / steps for phase in after if after[phase]}
