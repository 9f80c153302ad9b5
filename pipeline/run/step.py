"""What a training step needs, built once; and the step itself, over all ranks."""

import functools
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from kernels.dispatch import interpreted
from pipeline.config import ExperimentConfig
from pipeline.data.loader import Batch, Loader
from pipeline.data.masks import block_masks
from pipeline.data.mixing import Segment
from pipeline.data.reader import Dataset
from pipeline.data.remote.patience import SourceError
from pipeline.data.stream import Skip
from pipeline.elastic import Backbone, Subnet, build, cost
from pipeline.elastic.head import ProjectionHeads
from pipeline.elastic.layers import recut_in_backward
from pipeline.elastic.sampling import SubnetSampler
from pipeline.elastic.subnet import Grid
from pipeline.elastic.transfer import Late
from pipeline.engine.agreement import Agreed, Own, agree
from pipeline.engine.core import Engine
from pipeline.engine.distributed import Ranks
from pipeline.engine.layouts import working_dtype
from pipeline.errors import UserError
from pipeline.measure.bands import Bands
from pipeline.measure.health import Probe, Reduced
from pipeline.measure.phases import Phases
from pipeline.method.losses import Centering
from pipeline.method.schedules import Rise, Schedules, StepValues
from pipeline.method.tri_branch import Branch, Crops, StochasticDepth, TriBranch
from pipeline.models.order import Order, put_in_order
from pipeline.models.start import begin, bring_the_rest, frozen_start
from pipeline.monitor.report import Health, StepReport, Timing


class Clock:
    """When the last step was over."""

    def __init__(self, device: torch.device):
        self.waits = device.type == "cuda"
        self.last = 0.0


class Underway:
    """A step that was handed to the device, and what the host knew of it then.

    Attributes:
        samples: consumed over all ranks with this step.
        skips: samples that this rank left out for it.
    """

    def __init__(
        self,
        agreed: Agreed,
        values: StepValues,
        subnet: Subnet | None,
        samples: int,
        skips: list[Skip],
        began: float,
        data_wait: float,
        clock: Clock,
        phases: Phases,
        health: tuple[Reduced, Late, list[str]] | None,
    ):
        self.samples, self.skips = samples, skips
        self._agreed, self._values, self._subnet, self._health = agreed, values, subnet, health
        self._began, self._data_wait, self._clock = began, data_wait, clock
        self._phases = dict(phases.seconds)
        self._ended = None if clock.waits else time.perf_counter()

    @functools.cached_property
    def report(self) -> StepReport:
        """What came of it; waits until the device is through with it. Steps are read in their order."""
        agreed, health = self._agreed.read(), None
        if self._health:
            reduced, norms, kinds = self._health
            health = Health(reduced.read(), dict(zip(kinds, norms.tolist(), strict=True)))
        ended = self._ended or time.perf_counter()
        seconds, self._clock.last = ended - max(self._began, self._clock.last), ended
        return StepReport(agreed, self._values, self._subnet, Timing(self._data_wait, seconds), self._phases, health)


class Trainer:
    """Model, engine, data and schedules of a run on one rank.

    Args:
        config: the experiment.
        ranks: this process and its peers.
        enter: told the phase of the step that begins.
        fresh: the run begins, from `model.init_from` if that is set; a checkpoint replaces the weights otherwise.
        rise: where the learning rate was raised in the middle of the run, if it was.

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
        rise: Rise | None = None,
    ):
        self.config, self.ranks, self.enter = config, ranks, enter
        self.global_batch = config.data.batch_size * ranks.world_size
        _require_kernels(config, ranks.device)
        self.dataset = self.open_dataset()
        self.schedules = Schedules(config.optim, config.loss, self.global_batch, rise)
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
        # the engine broadcasts the student's weights
        begun = ranks.agree(lambda: begin(student, source)) if source and fresh else None
        self.order = self._put_in_order(student.backbone) if fresh else None
        measured = self.order.blocks if self.order else begun.block_importance if begun else None
        if measured and config.model.block_importance is None:
            self.config = config = config.with_model(block_importance=measured)
            student.backbone.config = config.model
        if config.engine.compile:
            student.backbone.compile_blocks()
        self.engine = Engine(student, config.optim, config.engine, ranks.device)
        backbone = student.backbone
        self.patch_grid = backbone.patch_grid(config.data.global_crops.size)
        self.phases = Phases(ranks.device)
        drop = StochasticDepth(config.data.seed, config.model.drop_path, backbone.num_draws)
        kernels = config.engine.kernels
        centering = Centering(
            config.loss.centering, config.heads.prototypes, ranks.device, kernels.loss, sinkhorn_impl=kernels.sinkhorn
        )
        anchor = (
            frozen_start(config, ranks, self.order, fresh, working_dtype(config.engine))
            if config.loss.anchor_weight
            else None
        )
        self.tri_branch = TriBranch(config.loss, self.grid.largest, drop, centering, self.phases.lap, anchor)
        if source and begun:
            bring_the_rest(self.engine, centering, source, begun, ranks)
        self.bands = Bands(config.model, self.grid)
        self.dtype = working_dtype(config.engine)
        self.loader: Loader
        self.skips: list[Skip] = []
        self.lost: SourceError | None = None
        self.segment = Segment()
        self._clock = Clock(ranks.device)

    def _put_in_order(self, backbone: Backbone) -> Order | None:
        """Sort weights that have just been loaded on rank 0 by `model.init_order`, on real images. Collective."""
        if self.config.model.init_order == "none" or self.dataset is None:
            return None
        self.enter("the start: order of the weights")
        return self.ranks.agree(lambda: put_in_order(backbone, self.config, self.ranks.device, self.dataset))

    def open_dataset(self) -> Dataset | None:
        """The shards, before anything large is built; None for a trainer that needs none."""
        return _open_dataset(self.config, self.global_batch)

    def start_data(self, sample: int) -> None:
        """Open the data stream at a global sample count."""
        self.loader = Loader(
            self.config.data,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            start_sample=sample,
            device=self.ranks.device,
            colours="triton" if self.config.engine.kernels.colours == "triton" else None,
            on_skip=self.skips.append,
            dataset=self.dataset,
            segment=self.segment,
            channels=self.config.model.in_chans,
        )

    def step(self, step: int, stop_requested: bool = False, parts_saved: int = 0) -> "Underway":
        """Train on the next batch; the update is skipped on every rank if any value is not finite on one.

        The host waits for nothing that the device computes: what came of it is read later, from what this returns.

        Args:
            step: steps before this one.
            stop_requested: this rank was asked to stop; all learn of it.
            parts_saved: `Checkpoints.parts_finished` of this rank; all learn their sum.
        """
        began = time.perf_counter()
        self.enter(f"data of step {step + 1}")
        values = self.schedules.at(step)
        skipped_before = self.loader.skipped.total()
        self.phases.start()
        batch = self._next_batch()
        data_wait = self.phases.waited_for_data()
        crops = Crops.of(batch.global_crops.to(self.dtype), batch.local_crops.to(self.dtype), self._masks(step, values))
        subnet = self.draw(step)
        probe = self._probe(step, subnet)

        self.enter(f"teacher of step {step + 1}")
        targets = self.tri_branch.teacher_targets(self.engine.teacher, crops, values, probe)
        self.enter(f"students of step {step + 1}")
        with self.engine.backward_window(self.tri_branch.passes(subnet)):
            losses = self.tri_branch.run(
                self.engine.student, self.engine.backward, crops, targets, subnet, step, self.ranks.rank, probe
            )
        self.enter(f"agreement of step {step + 1}")
        masked = len(crops.masked) / len(crops.global_)
        own = Own(
            stop=stop_requested,
            skipped=self.loader.skipped.total() - skipped_before,
            flops=cost.step_flops(self.config, subnet, masked).total,
            band=self.bands.index(subnet),
            parts_saved=parts_saved,
            no_data=self.lost is not None,
        )
        agreed = agree(losses, self.engine.gradient_squares(), own)
        self.phases.lap("reduce")
        self.enter(f"update of step {step + 1}")
        self.engine.apply(values, agreed.norms, agreed.good, self.phases.lap)
        self.tri_branch.centering.commit(agreed.good)
        health = None
        if probe:
            health = probe.reduce(), Late(self.tri_branch.centering.norms()), list(self.tri_branch.centering.center)
        skips, self.skips[:] = list(self.skips), []
        return Underway(
            agreed, values, subnet, self.loader.next_sample, skips, began, data_wait, self._clock, self.phases, health
        )

    def _next_batch(self) -> Batch:
        """The next batch; one without a picture in it if the data cannot be had, which all ranks learn from this step.

        A rank that stopped here by itself would leave the others waiting in the middle of the step, unable to save.
        """
        if self.lost is None:
            try:
                return next(self.loader)
            except SourceError as error:
                self.lost = error
        data, channels = self.config.data, self.config.model.in_chans
        kinds = ((2, data.global_crops.size), (data.local_crops.count, data.local_crops.size))
        shapes = [(crops * data.batch_size, channels, size, size) for crops, size in kinds]
        return Batch(*(torch.zeros(shape, device=self.ranks.device) for shape in shapes))

    def draw(self, step: int) -> Subnet | None:
        """The elastic student of this rank, if the experiment has one."""
        return self.sampler.draw(step, self.ranks.rank)

    def close(self) -> None:
        if hasattr(self, "loader"):
            self.loader.close()
        self.engine.destroy()

    def _probe(self, step: int, subnet: Subnet | None) -> Probe | None:
        if (step + 1) % self.config.metrics.health_every_steps:
            return None
        loss, heads = self.config.loss, self.config.heads
        return Probe(
            heads.prototypes,
            self.bands.index(subnet),
            loss.student_temp,
            self.ranks.device,
            self.config.engine.kernels.loss,
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


def _require_kernels(config: ExperimentConfig, device: torch.device) -> None:
    if config.uses_triton() and device.type == "cpu" and not interpreted():
        raise UserError("the Triton kernels need a GPU and there is none", "engine.kernels", "set engine.kernels=eager")


def _open_dataset(config: ExperimentConfig, global_batch: int) -> Dataset:
    dataset = Dataset(config.data.train, config.data.piece_mb, config.data.image)
    if config.data.lanes > global_batch:
        what = f"{config.data.lanes} lanes are more than the {global_batch} images of a global batch"
        raise UserError(what, "data.lanes", "set it to the number of nodes, or of ranks")
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
    sharded = config.engine.gathers_blocks
    backbone = build(
        config.model,
        attention=config.engine.kernels.attention,
        residual=config.engine.kernels.residual,
        activation_checkpointing=config.engine.activation_checkpointing,
        sharded=sharded,
    )
    heads = ProjectionHeads(backbone.feature_dim(backbone.grid.largest), config.heads)
    if sharded:
        recut_in_backward(heads)
    return Branch(backbone, heads)
