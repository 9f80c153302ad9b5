"""Everything that changes over a run, as pure functions of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


LAID_OUT = ("lr", "weight_decay", "momentum", "teacher_temp")
"""What follows a curve over the run; the rest of `StepValues` is switched on or off."""


class Rise(NamedTuple):
    """Where a learning rate that was raised in the middle of a run warms up anew.

    Attributes:
        step: completed steps.
        lr: what it was there.
    """

    step: int
    lr: float


class Schedules:
    """The schedules of one experiment.

    The learning rate is `base_lr * sqrt(global_batch / 1024)`, warmed up linearly and followed by a cosine that is laid
    out over `optim.schedule_steps`; training stops at `optim.total_steps`, on the way down. If it was raised in the
    middle of a run, it reaches that curve from where it was, over as many steps as the warm-up has.
    """

    def __init__(self, optim: OptimConfig, loss: LossConfig, global_batch: int, rise: Rise | None = None):
        self.optim, self.loss, self.rise = optim, loss, rise
        self.peak_lr = optim.base_lr * math.sqrt(global_batch / 1024)
        self.warmup = round(optim.warmup_epochs * optim.steps_per_epoch)

    def at(self, step: int) -> StepValues:
        optim, loss = self.optim, self.loss
        horizon, per_epoch = optim.schedule_steps, optim.steps_per_epoch
        temp = loss.teacher_temp
        return StepValues(
            epoch=step / per_epoch,
            lr=self._lr(step),
            weight_decay=cosine(step, *optim.weight_decay, horizon),
            momentum=cosine(step, *optim.ema, horizon),
            teacher_temp=linear(step, temp.start, temp.end, round(temp.warmup_epochs * per_epoch)),
            ibot=loss.ibot_weight > 0 and step >= loss.ibot_start_epoch * per_epoch,
            prototypes_frozen=step < optim.freeze_prototypes_epochs * per_epoch,
            backbone_frozen=step < optim.head_warmup_epochs * per_epoch,
        )

    def course(self, name: str, first: int) -> list[tuple[int, float]]:
        """A value of `LAID_OUT` where it begins, is highest and ends from completed step `first` on, as (step, value).

        As in the records of a run, a step is counted from 1. Of a schedule that has ended, its last value.
        """
        last = max(self.optim.total_steps - 1, first)
        turns = {first, self.warmup, last, *([self.rise.step + self.warmup] if self.rise else [])}
        points = [(step + 1, getattr(self.at(step), name)) for step in sorted(turns) if first <= step <= last]
        begin, *_, end = points if len(points) > 1 else points * 2
        highest = max(points, key=lambda point: point[1])
        return list(dict.fromkeys([begin, *([highest] if highest[1] > max(begin[1], end[1]) else []), end]))

    def _lr(self, step: int) -> float:
        optim, warmup = self.optim, self.warmup
        if step < warmup:
            lr = linear(step, 0.0, self.peak_lr, warmup)
        else:
            lr = cosine(step - warmup, self.peak_lr, optim.min_lr, optim.schedule_steps - warmup)
        if self.rise and self.rise.lr < lr and step < self.rise.step + warmup:
            return self.rise.lr + (lr - self.rise.lr) * (step - self.rise.step) / warmup
        return lr


def course_text(points: Sequence[Sequence[float]]) -> str:
    """`Schedules.course` for people: `0.002 at step 401, 0.01 at step 440, 1e-05 at step 800`."""
    return ", ".join(f"{value:.4g} at step {step:.0f}" for step, value in points)
