"""Three steps (or run.max_steps) of the method, by the engine or by plain PyTorch; saves losses and weights.

Usage: three_steps.py engine|inductor|plain64|plain32 VIRTUAL_RANKS CONFIG OUT [CONFIG OUT ...]

Plain PyTorch (`pipeline.bench.plain`) knows nothing of DeepSpeed, of factored targets or of ranks: one process
computes what `VIRTUAL_RANKS` ranks should, from materialised targets, as the formulas of the paper read. In fp64 it is
the truth. `plain32` shows what fp32 costs on the processor and with the libraries at hand: `ROUNDINGS` times the same,
each time with the images moved by a unit in the last place, since it is chance whether a sum is rounded up. `inductor`
is the engine with what is compiled compiled to the end; else a compiled block is traced, and its graph runs as it is.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partialmethod
from types import MethodType, SimpleNamespace
from unittest import mock

import deepspeed
import torch
import torch.nn.functional as F
from thin_resnets import thin_resnets
from torch import Tensor, nn

from kernels.dispatch import interpreted
from pipeline.bench.plain import Inputs, Plain
from pipeline.config import EngineConfig, ExperimentConfig, load_config
from pipeline.data.loader import Loader
from pipeline.data.masks import block_masks
from pipeline.elastic import Backbone, Subnet
from pipeline.engine import distributed, fully_shard, zero
from pipeline.engine.distributed import Ranks
from pipeline.engine.fully_shard import gathered
from pipeline.method.schedules import Schedules, StepValues
from pipeline.method.tri_branch import Branch
from pipeline.run.step import Trainer, build_student

STEPS = 3
ROUNDINGS = 2
EPS = 1e-4  # AdamW's default 1e-8 turns rounding noise of vanishing gradients into full steps


def all_masks(config: ExperimentConfig, step: int, images: int, grid: tuple[int, int], values: StepValues):
    """Masks of the whole batch, so that any split over ranks sees the same."""
    loss = config.loss
    probability = loss.mask_probability if values.ibot else 0.0
    return block_masks(config.data.seed, step, 0, 2 * images, grid, probability, loss.mask_ratio)


def by_engine(config: ExperimentConfig, ranks: Ranks) -> dict:
    trainer = Trainer(config, ranks)
    trainer.start_data(0)
    for group in trainer.engine.optimizer.param_groups:
        group["eps"] = EPS

    def masks(self: Trainer, step: int, values: StepValues):
        share = 2 * config.data.batch_size
        every = all_masks(config, step, trainer.global_batch, trainer.patch_grid, values)
        return every[ranks.rank * share : (ranks.rank + 1) * share]

    trainer._masks = MethodType(masks, trainer)
    with mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as all_reduce:
        losses = [trainer.step(step).report.agreed.losses for step in range(config.run.max_steps or STEPS)]
    groups, shard = trainer.engine.groups, trainer.engine.shard
    own = {"student": shard.master.detach().cpu(), "teacher": shard.ema.cpu()}
    # at once, since a tensor takes longer to be sent than its numbers do
    shares = ranks.gather(([(group.place, group.pieces) for group in groups], own))
    weights = {"student": {}, "teacher": {}}
    for number, group in enumerate(groups):
        spec = group.spec
        for branch, whole_branch in weights.items():
            flat = torch.full((spec.numel,), torch.nan)
            for places, vectors in shares:
                place, pieces = places[number]
                for piece in pieces:
                    flat[piece.there] = vectors[branch][place][piece.here]
            for name, shape, offset, size in zip(spec.names, spec.shapes, spec.offsets, spec.sizes, strict=True):
                whole_branch[name] = flat[offset : offset + size].view(shape).clone()
    with trainer.engine.whole_teacher() as branch:
        teacher = {name: p.detach().clone() for name, p in branch.named_parameters()}
    with whole(trainer.engine.branch, config.engine) as branch:
        student = {name: p.detach().clone() for name, p in branch.named_parameters()}
    trainer.close()
    return {
        "losses": losses,
        "all_reduces": all_reduce.call_count / len(losses),
        "groups": len(trainer.engine.groups),
        **weights,
        "working": {"teacher": teacher, "student": student},
        "center": trainer.tri_branch.centering.center,
    }


@contextmanager
def whole(branch: Branch, engine: EngineConfig) -> Iterator[Branch]:
    """The student with all of its working weights on every rank."""
    sharded = engine.backend == "deepspeed" and engine.zero_stage == 3
    theirs = deepspeed.zero.GatheredParameters(list(branch.parameters())) if sharded else nullcontext()
    with theirs, gathered(branch):  # which does nothing to what is not FSDP2's
        yield branch


def last_place(x: Tensor, seed: int) -> Tensor:
    """Move every number by a unit in its last place, up or down or not at all; seed 0 moves none."""
    moves = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(seed))
    return x * (1 + moves * torch.finfo(x.dtype).eps) if seed else x


def by_plain_torch(
    config: ExperimentConfig, subnets: list[list[Subnet | None]], dtype: torch.dtype, rounding: int = 0
) -> dict:
    images = config.data.batch_size * len(subnets[0])
    loader = Loader(config.data.model_copy(update={"batch_size": images}))
    schedules, student = Schedules(config.optim, config.loss, images), build_student(config)
    grid = student.backbone.patch_grid(config.data.global_crops.size)
    oracle = Plain(config, student, torch.device("cpu"), dtype, EPS)
    losses = []
    for step in range(config.run.max_steps or STEPS):
        values, batch = schedules.at(step), next(loader)
        masks = all_masks(config, step, images, grid, values)
        inputs = Inputs.of(*(last_place(crops, rounding).to(dtype) for crops in batch), masks)
        found = oracle.step(step, values, inputs, subnets[step])
        losses.append({name: float(value) for name, value in found.items()})
    loader.close()
    return {
        "losses": losses,
        "student": {n: p.detach() for n, p in oracle.student.named_parameters()},
        "teacher": {n: p.detach() for n, p in oracle.teacher.named_parameters()},
        "center": oracle.center,
    }


def draws(config: ExperimentConfig, ranks: int) -> list[list[Subnet | None]]:
    from functools import partial

    from pipeline.elastic import cost
    from pipeline.elastic.sampling import SubnetSampler
    from pipeline.elastic.subnet import Grid

    grid = Grid(config.model, config.sampling.small_bias)
    sampler = SubnetSampler(
        grid, partial(cost.flops, config.model), ranks, config.sampling.assignment, config.data.seed
    )
    return [[sampler.draw(step, rank) for rank in range(ranks)] for step in range(config.run.max_steps or STEPS)]


def plain(mode: str, config: ExperimentConfig, subnets: list[list[Subnet | None]]) -> dict | list[dict]:
    if mode == "plain64":
        return by_plain_torch(config, subnets, torch.float64)
    return [by_plain_torch(config, subnets, torch.float32, rounding) for rounding in range(ROUNDINGS)]


def main() -> None:
    mode, virtual, *files = sys.argv[1:]
    torch.set_num_threads(1)
    # smooth, since it is chance on which side of ReLU's kink a rounding falls, and one that falls on the other changes
    # the gradients of a whole block; the real one is held against timm's networks
    nn.ReLU.forward = lambda self, x: F.silu(x)
    thin_resnets()
    if mode == "inductor":
        from torch._inductor import config as inductor

        inductor.compile_threads = 1  # or it starts processes, which have nothing to do where there is no GPU
    else:
        Backbone.compile_blocks = partialmethod(Backbone.compile_blocks, backend="eager")
    if interpreted():
        from interpreting import few_programs

        few_programs()
    zero.BUCKET = 30_000  # several of them
    ranks = distributed.initialize() if mode in ("engine", "inductor") else None
    if ranks:  # as if nodes had two of them
        fully_shard.platform = SimpleNamespace(node=lambda: f"node{ranks.rank // 2}")
    for path, out in zip(files[::2], files[1::2], strict=True):
        config = load_config(path)
        result = by_engine(config, ranks) if ranks else plain(mode, config, draws(config, int(virtual)))
        if ranks is None or ranks.is_main:
            torch.save(result, out)
    if ranks:
        distributed.shut_down()


if __name__ == "__main__":
    main()
