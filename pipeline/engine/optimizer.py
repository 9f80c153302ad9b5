"""The pass over a rank's shard as torch's optimizer, so that DeepSpeed can step it."""

import inspect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.optimizer import AdamWEma, Update
from pipeline.config import OptimConfig
from pipeline.engine.groups import MODULES, PARTS, FlatGroup
from pipeline.method.schedules import StepValues

_NORMED = 1 << 16
"""Elements of which a CPU takes the norm at once: it adds up their squares one after the other, in fp32."""


class Decision(NamedTuple):
    """What comes before an update.

    Attributes:
        factors: of the gradients per entry of `PARTS`, fp32, to clip them.
        good: fp32 scalar, 1 or 0: whether there is one.
        update: learning rate and the like.
    """

    factors: Tensor
    good: Tensor
    update: Update

    def to(self, device: torch.device) -> "Decision":
        return Decision(self.factors.to(device), self.good.to(device), self.update)


class FlatAdamW(torch.optim.Optimizer):
    """AdamW with the moving average over one flat shard.

    DeepSpeed puts the shard in the place of the parameters and the gradient beside it; `attach` says what else belongs
    to it, `decide` what the next step does.

    Args:
        params: whatever stands for the shard.
    """

    # torch's, without wrappers: they import its compiler, to tell it what not to compile
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, params: Sequence[Tensor]):
        super().__init__(params, {"lr": 0.0, "eps": 1e-8})
        self._pass: AdamWEma | None = None
        self._next: tuple[Decision, Sequence[Tensor] | None] | None = None

    def attach(self, one_pass: AdamWEma) -> None:
        self._pass = one_pass

    def decide(self, decision: Decision, gradients: Sequence[Tensor] | None = None) -> None:
        """Say what the next step does.

        Args:
            decision: on the device of the shard.
            gradients: of the shard, one after the other; None for those that will stand beside the parameter.
        """
        self._next = decision, gradients

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Do it; nothing before the first `decide`, as DeepSpeed makes such a step when it sets itself up."""
        if self._next is None or self._pass is None:
            return
        (decision, gradients), self._next = self._next, None
        group = self.param_groups[0]
        if gradients is None:
            gradients = [group["params"][0].grad]
        self._pass(gradients, decision.factors, decision.good, decision.update._replace(eps=group["eps"]))


def update_of(values: StepValues) -> Update:
    """Of a step."""
    frozen = [
        part
        for part, still in (("backbone", values.backbone_frozen), ("prototypes", values.prototypes_frozen))
        if still
    ]
    return Update(values.lr, values.weight_decay, values.momentum, frozen=frozenset(map(PARTS.index, frozen)))


def clip_factors(norms: Tensor, optim: OptimConfig) -> Tensor:
    """What brings gradients of these norms, one per module, below the limit; per entry of `PARTS`."""
    factors = (optim.clip_grad / (norms + 1e-6)).clamp(max=1.0)
    return torch.stack([factors[min(part, len(MODULES) - 1)] for part in range(len(PARTS))])


def module_squares(groups: Sequence[FlatGroup], gradients: Sequence[Tensor]) -> Tensor:
    """Squared norm of a shard's gradients per entry of `MODULES`, fp32.

    Args:
        groups: of the shard.
        gradients: of the shard, one after the other.
    """
    squares = []
    for module in MODULES:
        places = [group.place for group in groups if group.spec.module == module]
        parts = list(_between(gradients, places[0].start, places[-1].stop))
        norms = torch._foreach_norm(parts, 2, torch.float32) if parts else [torch.zeros(())]
        squares.append(torch.stack(norms).square().sum())
    return torch.stack(squares)


def _between(gradients: Sequence[Tensor], start: int, stop: int) -> Iterator[Tensor]:
    """The elements from `start` to `stop` of vectors that follow one another, as views."""
    begin = 0
    for gradient in gradients:
        low, high = max(start - begin, 0), min(stop - begin, gradient.numel())
        begin += gradient.numel()
        if low < high:
            limit = _NORMED if gradient.device.type == "cpu" else high - low
            yield from gradient.view(-1)[low:high].split(limit)
