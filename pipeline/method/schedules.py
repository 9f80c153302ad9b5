"""Everything that changes over a run, as pure functions of the step."""

import math
from dataclasses import dataclass

from pipeline.config import LossConfig, OptimConfig


def linear(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at step `steps - 1` (end point included), then constant."""
    if step >= steps - 1:
        return end
    return start + (end - start) * step / (steps - 1)


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """Half a cosine from `start` at step 0 towards `end` at step `steps`, then constant."""
    if step >= steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class StepValues:
    """What the step at hand uses."""

    epoch: float
    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    ibot: bool
    prototypes_frozen: bool
    backbone_frozen: bool


class Schedules:
    """The schedules of one experiment.

    The learning rate is `base_lr * sqrt(global_batch / 1024)`, warmed up linearly and followed by a cosine that is laid
    out over `optim.schedule_steps`; training stops at `optim.total_steps`, on the way down.
    """

    def __init__(self, optim: OptimConfig, loss: LossConfig, global_batch: int):
        self.optim, self.loss = optim, loss
        self.peak_lr = optim.base_lr * math.sqrt(global_batch / 1024)

    def at(self, step: int) -> StepValues:
        optim, loss = self.optim, self.loss
        horizon, per_epoch = optim.schedule_steps, optim.steps_per_epoch
        warmup = round(optim.warmup_epochs * per_epoch)
        if step < warmup:
            lr = linear(step, 0.0, self.peak_lr, warmup)
        else:
            lr = cosine(step - warmup, self.peak_lr, optim.min_lr, horizon - warmup)
        temp = loss.teacher_temp
        return StepValues(
            epoch=step / per_epoch,
            lr=lr,
            weight_decay=cosine(step, *optim.weight_decay, horizon),
            momentum=cosine(step, *optim.ema, horizon),
            teacher_temp=linear(step, temp.start, temp.end, round(temp.warmup_epochs * per_epoch)),
            ibot=loss.ibot_weight > 0 and step >= loss.ibot_start_epoch * per_epoch,
            prototypes_frozen=step < optim.freeze_prototypes_epochs * per_epoch,
            backbone_frozen=step < optim.head_warmup_epochs * per_epoch,
        )
