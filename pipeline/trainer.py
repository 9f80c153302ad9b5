"""What a training step needs, built once; and the step itself, over all ranks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import interpreted
from pipeline.config import ExperimentConfig
from pipeline.data.loader import Loader
from pipeline.data.masks import block_masks
from pipeline.data.reader import Dataset, Skip
from pipeline.distributed import Ranks
from pipeline.elastic import Subnet, build, cost
from pipeline.elastic.head import ProjectionHeads
from pipeline.elastic.layers import recut_in_backward
from pipeline.elastic.pretrained import load_pretrained
from pipeline.elastic.sampling import SubnetSampler
from pipeline.elastic.subnet import Grid
from pipeline.engine.core import Engine
from pipeline.engine.groups import MODULES
from pipeline.engine.layouts import working_dtype
from pipeline.errors import UserError
from pipeline.metrics.bands import Bands
from pipeline.metrics.families import BANDS
from pipeline.metrics.health import BranchHealth, Probe
from pipeline.schedules import Schedules, StepValues
from pipeline.tri_branch import Branch, Crops, StepLosses, TriBranch

TERMS = (
    ("dino", "intact"),
    ("dino", "elastic"),
    ("ibot", "intact"),
    ("ibot", "elastic"),
    ("koleo", "intact"),
    ("koleo", "elastic"),
    ("distill_global", "elastic"),
    ("distill_local", "elastic"),
)
_ELASTIC_LOSS = TERMS.index(("dino", "elastic"))


@dataclass(frozen=True)
class StepReport:
    """What all ranks know after a step.

    Attributes:
        losses: mean over ranks by "term/branch", and "total".
        gradient_norms: before clipping, by module.
        bad: values that were not finite on some rank; the update was skipped if there is any.
        stop: some rank was asked to stop.
        skipped: samples left out on any rank since the last step.
        values: the schedules of this step.
        subnet: the elastic student of this rank.
        data_wait_seconds, step_seconds: of this rank.
        flops: of all ranks.
        band_steps, band_losses: elastic students trained and the sum of their DINO losses, over ranks, per cost band.
        health, center_norms: of the representation, at every `metrics.health_every_steps` steps, else empty.
    """

    losses: dict[str, float]
    gradient_norms: dict[str, float]
    bad: list[str]
    stop: bool
    skipped: int
    values: StepValues
    subnet: Subnet
    data_wait_seconds: float
    step_seconds: float
    flops: float
    band_steps: list[float]
    band_losses: list[float]
    health: dict[str, BranchHealth]
    center_norms: dict[str, float]


class _Agreement(NamedTuple):
    """What the ranks agree on before anything is updated; `norms` are the gradient norms on the device."""

    losses: dict[str, float]
    norms: Tensor
    gradient_norms: dict[str, float]
    bad: list[str]
    stop: bool
    skipped: int
    flops: float
    band_steps: list[float]
    band_losses: list[float]


class Trainer:
    """Model, engine, data and schedules of a run on one rank.

    Args:
        config: the experiment.
        ranks: this process and its peers.
        enter: told the phase of the step that begins.
        fresh: the run begins, from `model.init_from` if that is set; a checkpoint replaces the weights otherwise.

    Raises:
        UserError: the data is missing or smaller than a global batch, the kernels cannot run on the device, or
            `model.init_from` cannot be loaded.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        ranks: Ranks,
        enter: Callable[[str], None] = lambda phase: None,
        fresh: bool = True,
    ):
        self.config, self.ranks, self.enter = config, ranks, enter
        self.global_batch = config.data.batch_size * ranks.world_size
        _require_kernels(config, ranks.device)
        self.dataset = _open_dataset(config, self.global_batch)
        self.schedules = Schedules(config, self.global_batch)
        self.grid = Grid(config.model, config.sampling.small_bias)
        self.sampler = SubnetSampler(
            self.grid,
            partial(cost.flops, config.model),
            ranks.world_size,
            config.sampling.assignment,
            config.data.seed,
        )
        student = build_student(config)
        source = config.model.init_from
        if source and fresh:
            ranks.agree(lambda: load_pretrained(student.backbone, source))  # the engine broadcasts the weights
        if config.engine.compile:
            student.backbone.compile_blocks()
        self.engine = Engine(student, config, ranks.device)
        backbone = student.backbone
        self.patch_grid = backbone.patch_grid(config.data.global_crops.size)
        self.tri_branch = TriBranch(config, self.grid.largest, backbone.num_draws, ranks.device)
        self.phases = self.tri_branch.phases
        self.bands = Bands(config.model, self.grid)
        self.dtype = working_dtype(config)
        self.loader: Loader
        self.skips: list[Skip] = []

    def start_data(self, sample: int) -> None:
        """Open the data stream at a global sample count."""
        self.loader = Loader(
            self.config.data,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_sample=sample,
            device=self.ranks.device,
            on_skip=self.skips.append,
            dataset=self.dataset,
        )

    def step(self, step: int, stop_requested: bool = False) -> StepReport:
        """Train on the next batch; the update is skipped on every rank if any value is not finite on one.

        Args:
            step: steps completed before this one.
            stop_requested: this rank was asked to stop; all learn of it.
        """
        began = time.perf_counter()
        self.enter(f"data of step {step + 1}")
        values = self.schedules.at(step)
        skipped_before = self.loader.skipped.total()
        self.phases.start()
        batch = next(self.loader)
        data_wait = self.phases.waited_for_data()
        crops = Crops.of(batch.global_crops.to(self.dtype), batch.local_crops.to(self.dtype), self._masks(step, values))
        subnet = self.sampler.draw(step, self.ranks.rank)
        probe = self.tri_branch.probe = self._probe(step, subnet)

        self.enter(f"teacher of step {step + 1}")
        targets = self.tri_branch.teacher_targets(self.engine.teacher, crops, values)
        self.phases.lap("teacher")
        self.enter(f"students of step {step + 1}")
        with self.engine.backward_window():
            losses = self.tri_branch.run(
                self.engine.student, self.engine.backward, crops, targets, subnet, step, self.ranks.rank
            )
        skipped = self.loader.skipped.total() - skipped_before
        self.enter(f"agreement of step {step + 1}")
        masked = len(crops.masked) / len(crops.global_)
        own = [float(stop_requested), float(skipped), cost.step_flops(self.config, subnet, masked).total]
        agreed = self._agree(losses, self.engine.gradient_squares(), own, self.bands.index(subnet))
        self.phases.lap("reduce")
        if agreed.bad:
            self.engine.discard()
        else:
            self.enter(f"update of step {step + 1}")
            self.engine.apply(values, agreed.norms, self.phases.lap)
            self.tri_branch.centering.commit()
        return StepReport(
            losses=agreed.losses,
            gradient_norms=agreed.gradient_norms,
            bad=agreed.bad,
            stop=agreed.stop,
            skipped=agreed.skipped,
            values=values,
            subnet=subnet,
            data_wait_seconds=data_wait,
            step_seconds=time.perf_counter() - began,
            flops=agreed.flops,
            band_steps=agreed.band_steps,
            band_losses=agreed.band_losses,
            health=probe.reduce() if probe else {},
            center_norms=self.tri_branch.centering.norms() if probe else {},
        )

    def close(self) -> None:
        if hasattr(self, "loader"):
            self.loader.close()
        self.engine.destroy()

    def _probe(self, step: int, subnet: Subnet) -> Probe | None:
        if (step + 1) % self.config.metrics.health_every_steps:
            return None
        loss, heads = self.config.loss, self.config.heads
        return Probe(
            heads.prototypes,
            self.bands.index(subnet),
            loss.student_temp,
            self.ranks.device,
            self.config.engine.kernels,
        )

    def _masks(self, step: int, values: StepValues) -> np.ndarray:
        crops = 2 * self.config.data.batch_size
        rows, columns = self.patch_grid
        if not values.ibot:
            return np.zeros((crops, rows * columns), dtype=bool)
        loss = self.config.loss
        return block_masks(
            self.config.data.seed, step, self.ranks.rank, crops, (rows, columns), loss.mask_probability, loss.mask_ratio
        )

    def _agree(self, losses: StepLosses, squares: Tensor, own: list[float], band: int) -> _Agreement:
        """One all-reduce: mean losses, what is not finite anywhere, gradient norms, requests to stop, counts.

        Args:
            losses: of this rank.
            squares: its squared gradient norms per module.
            own: whether it was asked to stop, its samples left out, its FLOPs.
            band: cost band of its elastic student.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        values = torch.stack([*(losses.terms.get(term, zero).double() for term in TERMS), losses.total.double()])
        finite = values.isfinite()
        chosen = [float(band == i) for i in range(len(BANDS))]
        counts = torch.tensor([*own, *chosen], dtype=torch.float64, device=self.ranks.device)
        values = values.where(finite, zero)
        by_band = values[_ELASTIC_LOSS] * counts[-len(BANDS) :]
        packed = torch.cat([values, (~finite).double(), squares.double(), counts, by_band])
        dist.all_reduce(packed)
        names = [*("/".join(term) for term in TERMS), "total"]
        sizes = [len(names), len(names), len(MODULES), len(own), len(BANDS), len(BANDS)]
        norms = packed.split(sizes)[2].sqrt()
        host = iter(packed.tolist())  # the step's one wait for the device
        means, flags, gradients, totals, band_steps, band_losses = ([*islice(host, size)] for size in sizes)
        infinite = {name for name, flag in zip(names, flags, strict=True) if flag}
        # the total is not finite whenever a term is not, and gradients follow: name the cause alone
        bad = sorted(infinite - {"total"}) or sorted(infinite)
        if not bad:
            bad = [f"gradient/{m}" for m, g in zip(MODULES, gradients, strict=True) if not math.isfinite(g)]
        return _Agreement(
            losses={
                name: math.nan if name in infinite else mean / self.ranks.world_size
                for name, mean in zip(names, means, strict=True)
            },
            norms=norms.float(),
            gradient_norms={m: math.sqrt(g) if g >= 0 else math.nan for m, g in zip(MODULES, gradients, strict=True)},
            bad=bad,
            stop=totals[0] > 0,
            skipped=round(totals[1]),
            flops=totals[2],
            band_steps=band_steps,
            band_losses=band_losses,
        )


def _require_kernels(config: ExperimentConfig, device: torch.device) -> None:
    if config.engine.kernels == "triton" and device.type == "cpu" and not interpreted():
        raise UserError("the Triton kernels need a GPU and there is none", "engine.kernels", "set engine.kernels=eager")


def _open_dataset(config: ExperimentConfig, global_batch: int) -> Dataset:
    dataset = Dataset(config.data.train)
    if len(dataset) < global_batch:
        raise UserError(
            f"{len(dataset)} images are fewer than a global batch of {global_batch}",
            "data.train",
            "lower data.batch_size or use fewer ranks",
        )
    return dataset


def build_student(config: ExperimentConfig) -> Branch:
    """The student, initialised at random from the seed of the experiment, on the CPU in fp32."""
    torch.manual_seed(config.data.seed)
    sharded = config.engine.effective_stage() == 3
    backbone = build(
        config.model,
        kernels=config.engine.kernels,
        activation_checkpointing=config.engine.activation_checkpointing,
        sharded=sharded,
    )
    heads = ProjectionHeads(backbone.feature_dim(backbone.grid.largest), config.heads)
    if sharded:
        recut_in_backward(heads)
    return Branch(backbone, heads)
