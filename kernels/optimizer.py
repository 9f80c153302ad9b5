"""Clipping, AdamW, the moving average and the rounded copies of both, in one pass over a flat shard.

Nothing here knows how the shard came about: it is what one rank holds of some weights, in flat vectors of one length,
and segments say how its elements differ. Whether the update happens is a flag on the device, so nobody waits for it.
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import use_triton

BETAS = (0.9, 0.999)
_CACHED = 1 << 16
"""Elements that eager code takes at a time on a CPU: so few that they stay in the processor's cache meanwhile."""


class Segment(NamedTuple):
    """Neighbouring elements of a shard that are updated alike.

    Attributes:
        start, length: which.
        part: that they belong to; parts are clipped each by its factor, and frozen each by itself.
        lr_scale: multiplier of the learning rate.
        decayed: whether weight decay applies.
    """

    start: int
    length: int
    part: int
    lr_scale: float
    decayed: bool

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass
class Shard:
    """Flat vectors of one length, contiguous, on one device.

    Attributes:
        master: fp32 weights.
        ema: their moving average, fp32.
        first, second: AdamW's moments, fp32.
        steps: updates so far, an fp32 scalar.
        student, teacher: copies of `master` and `ema` in the working precision; None where nobody wants one.
    """

    master: Tensor
    ema: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor
    student: Tensor | None = None
    teacher: Tensor | None = None

    @classmethod
    def of(cls, master: Tensor, ema: Tensor, student: Tensor | None = None, teacher: Tensor | None = None) -> "Shard":
        """With moments of zero."""
        master = master.detach()
        moments = torch.zeros_like(master), torch.zeros_like(master)
        return cls(master, ema, *moments, torch.zeros((), device=master.device), student, teacher)

    @property
    def vectors(self) -> list[Tensor]:
        """All that are there."""
        copies = [copy for copy in (self.student, self.teacher) if copy is not None]
        return [self.master, self.ema, self.first, self.second, *copies]


class Update(NamedTuple):
    """What is the same for all elements of a step.

    Attributes:
        lr: learning rate, before `Segment.lr_scale`.
        weight_decay: decoupled, where `Segment.decayed`.
        momentum: share of the old average that stays.
        eps: AdamW's.
        frozen: parts whose weights stay, though their moments and average go on.
    """

    lr: float
    weight_decay: float
    momentum: float
    eps: float = 1e-8
    frozen: Collection[int] = ()

    def of(self, segment: Segment) -> tuple[float, float]:
        """Learning rate and weight decay of a segment."""
        if segment.part in self.frozen:
            return 0.0, 0.0
        return self.lr * segment.lr_scale, self.weight_decay if segment.decayed else 0.0


class AdamWEma:
    """The pass over one shard.

    Args:
        shard: whose vectors it changes in place.
        segments: of the shard, rising; elements in none of them (padding) stay as they are.
        impl: "eager" or "triton".

    Raises:
        ValueError: vectors of different lengths or not contiguous, segments outside of the shard or out of order, or
            `impl` is unknown or cannot run here.
    """

    def __init__(self, shard: Shard, segments: Sequence[Segment], *, impl: str):
        self.shard, self.segments = shard, [segment for segment in segments if segment.length]
        length = len(shard.master)
        for vector in shard.vectors:
            if vector.shape != (length,) or not vector.is_contiguous():
                raise ValueError(f"shard: expected contiguous vectors of {length}, got {list(vector.shape)}")
        edges = [edge for segment in self.segments for edge in (segment.start, segment.stop)]
        if edges != sorted(edges) or (edges and not 0 <= edges[0] <= edges[-1] <= length):
            raise ValueError(f"segments: expected rising ones within {length} elements")
        self._fused = use_triton(impl, shard.master)
        device = shard.master.device
        self._betas = torch.tensor(BETAS, dtype=torch.float64, device=device)
        cached = _CACHED if device.type == "cpu" else max(length, 1)
        self._scratch = torch.empty(0 if self._fused else min(cached, length), device=device)

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor], factors: Tensor, good: Tensor, update: Update) -> None:
        """Update the shard, or, if the flag is down, leave it as it is to the bit.

        Args:
            gradients: vectors that make up the gradient of the shard, or of its beginning, one after the other. They
                may be overwritten.
            factors: fp32 `[parts]`, what the gradients of a part are multiplied by.
            good: fp32 scalar, 1 or 0.
            update: of this step.

        Raises:
            ValueError: the gradients end within a segment.
        """
        if not self.segments:
            return
        found = sum(map(torch.Tensor.numel, gradients))
        if not self.segments[-1].stop <= found <= len(self.shard.master):
            raise ValueError(f"gradients: expected at least {self.segments[-1].stop} elements, got {found}")
        self.shard.steps.add_(good)
        if self._fused:
            self._by_triton(gradients, factors, good, update)
        else:
            self._eagerly(gradients, factors, good, update)

    def _by_triton(self, gradients: Sequence[Tensor], factors: Tensor, good: Tensor, update: Update) -> None:
        from kernels.fused.optimizer import update_

        # in fp64, since 1 - 0.999^n in fp32 loses four digits at first
        correction = 1 - self._betas**self.shard.steps
        flags = torch.stack([good.double(), correction[0].reciprocal(), correction[1].rsqrt()]).float()
        frozen = sum(1 << part for part in set(update.frozen))
        whole = gradients[0].contiguous() if len(gradients) == 1 else torch.cat(list(gradients))
        shard = self.shard
        update_(
            (shard.master, shard.first, shard.second, shard.ema),
            (shard.student, shard.teacher),
            whole,
            self._tables,
            torch.cat([flags, factors]),
            update.lr,
            update.weight_decay,
            update.momentum,
            BETAS,
            update.eps,
            frozen,
        )

    @functools.cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        from kernels.fused.optimizer import tables

        return tables(self.segments, self.shard.master.device)

    def _eagerly(self, gradients: Sequence[Tensor], factors: Tensor, good: Tensor, update: Update) -> None:
        """By torch's fused steps, which look at the flag themselves: of AdamW, and of SGD on the way to the average."""
        shard, bad, divisors = self.shard, (1 - good).float(), factors.float().reciprocal()
        starts = [0, *accumulate(map(torch.Tensor.numel, gradients))]
        for index, place, segment in _runs(self.segments, starts, len(self._scratch)):
            lr, weight_decay = update.of(segment)
            gradient = gradients[index].view(-1)[place.start - starts[index] : place.stop - starts[index]]
            scratch = self._scratch[: place.stop - place.start]
            if gradient.dtype != torch.float32 or gradient.stride() != (1,):
                gradient = scratch.copy_(gradient)
            master, ema = shard.master[place], shard.ema[place]
            torch._fused_adamw_(
                [master],
                [gradient],
                [shard.first[place]],
                [shard.second[place]],
                [],
                [shard.steps],
                lr=lr,
                beta1=BETAS[0],
                beta2=BETAS[1],
                weight_decay=weight_decay,
                eps=update.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=divisors[segment.part],
                found_inf=bad,
            )
            torch._fused_sgd_(
                [ema],
                [torch.sub(ema, master, out=scratch)],
                [],
                weight_decay=0.0,
                momentum=0.0,
                lr=1 - update.momentum,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=bad,
            )
            if shard.student is not None:
                shard.student[place].copy_(master)
            if shard.teacher is not None:
                shard.teacher[place].copy_(ema)


def _runs(segments: Sequence[Segment], starts: Sequence[int], limit: int) -> Iterator[tuple[int, slice, Segment]]:
    """Up to `limit` elements that lie in one segment and one gradient: which gradient, the elements, the segment."""
    index = 0
    for segment in segments:
        at = segment.start
        while at < segment.stop:
            while starts[index + 1] <= at:
                index += 1
            stop = min(at + limit, segment.stop, starts[index + 1])
            yield index, slice(at, stop), segment
            at = stop
