"""Compiles all that training will run before its first step, so that no rank waits for another's compiler later.

A width is a shape, as is an MLP ratio, and every shape is a graph of its own. Met as training draws them, the last
would come hours after the start, at different steps on different ranks.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from kernels.dispatch import interpreted
from pipeline.config import ExperimentConfig
from pipeline.elastic.subnet import Subnet
from pipeline.method.schedules import StepValues
from pipeline.method.tri_branch import Crops
from pipeline.run.step import Trainer


def is_compiled(config: ExperimentConfig) -> bool:
    """Whether a width that is met for the first time makes a compiler run."""
    return config.engine.compile or (config.uses_triton() and not interpreted())


def rehearse(trainer: Trainer, tell: Callable[[int, int, int], None]) -> None:
    """Make a step of every width and MLP ratio and discard it: weights, moments, teacher, data stay as they are.

    Collective.

    The ranks of a node begin with different widths, so that each compiles another one and then finds those of the
    others in the cache that they share.

    Args:
        trainer: before its first step.
        tell: called before each with its number, from 1, with how many there are, and the width.
    """
    shapes, shift = trainer.grid.of_every_shape(trainer.grid.largest.depths), trainer.ranks.local_rank
    crops, values = _blank_crops(trainer), replace(trainer.schedules.at(0), ibot=True)
    method = trainer.tri_branch
    lap, method.lap = method.lap, lambda part: None  # a compiler's time is in no phase
    try:
        for number in range(len(shapes)):
            subnet = shapes[(number + shift) % len(shapes)]
            tell(number + 1, len(shapes), subnet.width)
            _discarded_step(trainer, crops, values, None if trainer.config.sampling.alone else subnet)
    finally:
        method.lap = lap


def _discarded_step(trainer: Trainer, crops: Crops, values: StepValues, subnet: Subnet | None) -> None:
    engine, method = trainer.engine, trainer.tri_branch
    targets = method.teacher_targets(engine.teacher, crops, values)
    with engine.backward_window(method.passes(subnet)):
        method.run(engine.student, engine.backward, crops, targets, subnet, 0, trainer.ranks.rank)
    squares = engine.gradient_squares()
    bad = torch.zeros((), device=squares.device)
    engine.apply(values, squares.sqrt(), bad)
    method.centering.commit(bad)


def _blank_crops(trainer: Trainer) -> Crops:
    """Black crops of a rank's batch, one patch of each masked."""
    model, data = trainer.config.model, trainer.config.data
    rows, columns = trainer.patch_grid
    masks = np.zeros((2 * data.batch_size, rows * columns), dtype=bool)
    masks[:, 0] = True

    def blank(count: int, side: int) -> torch.Tensor:
        shape = (count * data.batch_size, model.in_chans, side, side)
        return torch.zeros(shape, dtype=trainer.dtype, device=trainer.ranks.device)

    return Crops.of(blank(2, data.global_crops.size), blank(data.local_crops.count, data.local_crops.size), masks)
