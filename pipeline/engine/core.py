"""The engine: the student over the ranks, its optimizer step, and the EMA teacher."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels.optimizer import AdamWEma, Shard
from pipeline.config import EngineConfig, OptimConfig
from pipeline.engine.groups import FlatGroup, GroupSpec, parameter_groups
from pipeline.engine.layouts import Layout, Replica
from pipeline.engine.optimizer import Decision, clip_factors, module_squares, update_of
from pipeline.method.schedules import StepValues
from pipeline.method.tri_branch import Branch


class Engine:
    """The student under DeepSpeed or FSDP2 with its teacher.

    Use it step by step:

        with engine.backward_window():
            ... engine.student(...); engine.backward(loss) ... twice
        squares = engine.gradient_squares()
        engine.apply(values, norms, good)

    Args:
        student: a `Branch` on the CPU; its weights are broadcast from rank 0.
        optim: multipliers of the learning rate, and where to clip.
        config: how to compute.
        device: where it trains.

    Attributes:
        groups: the parameter groups, as this rank holds them.
    """

    def __init__(self, student: Branch, optim: OptimConfig, config: EngineConfig, device: torch.device):
        self.config, self.device = config, device
        self._optim = optim
        self._passes_left = 0
        self._layout = layout = _layout(student, parameter_groups(student, optim), config, device)
        # an offloaded shard is on the CPU, where no kernel but the eager one runs
        impl = "eager" if config.offload_optimizer else config.kernels.optimizer
        segments = [group.segment for group in layout.groups]
        layout.optimizer.attach(AdamWEma(layout.shard, segments, impl=impl))
        self.optimizer, self.groups = layout.optimizer, layout.groups

    @property
    def student(self) -> Callable[..., Any]:
        """Called like `Branch`. As the others, not to be kept: its weights have arrived when this returns it."""
        return self._layout.student

    @property
    def branch(self) -> Branch:
        """The student itself, whose parameters may be in shards."""
        return self._layout.branch

    @property
    def teacher(self) -> Callable[..., Any]:
        """Called like `Branch`."""
        return self._layout.teacher

    @contextmanager
    def backward_window(self, passes: int = 2) -> Iterator[None]:
        """All backward passes of one step; gradients are averaged over the ranks when it closes."""
        self._passes_left = passes
        yield
        assert self._passes_left == 0, "a step has a fixed number of backward passes"
        self._layout.finish_backward()

    def backward(self, loss: Tensor) -> None:
        """One of the window's backward passes.

        Raises:
            RuntimeError: there is no window, or it had all its passes.
        """
        if not self._passes_left:
            raise RuntimeError("backward outside of a backward_window: its gradients would be lost or counted twice")
        self._passes_left -= 1
        self._layout.backward(loss, last=self._passes_left == 0)

    @torch.no_grad()
    def gradient_squares(self) -> Tensor:
        """Squared gradient norm per entry of `MODULES`, fp32 `[2]`; its sum over the ranks is the global one."""
        return module_squares(self.groups, self._layout.gradients()).to(self.device) / self.replica.total

    @torch.no_grad()
    def apply(
        self, values: StepValues, norms: Tensor, good: Tensor, lap: Callable[[str], None] = lambda phase: None
    ) -> None:
        """Clip, update the weights and the average, and begin to rebuild teacher and student.

        Args:
            values: learning rate, weight decay and momentum of this step.
            norms: global gradient norm per entry of `MODULES`, fp32 on the device.
            good: fp32 scalar on the device; 0 leaves weights, moments and teacher as they are.
            lap: told the name of each part when it is done.
        """
        self._layout.update(Decision(clip_factors(norms, self._optim), good, update_of(values)))
        lap("optimizer")
        self._layout.publish()
        lap("ema")

    @property
    def replica(self) -> Replica:
        """Which of how many copies of its shard this rank holds."""
        return self._layout.replica

    def whole_teacher(self) -> AbstractContextManager[Branch]:
        """The teacher as a `Branch` with all of its weights on every rank, to be read only. Collective."""
        return self._layout.whole_teacher()

    def moments(self, group: FlatGroup) -> dict[str, Tensor]:
        """AdamW's moments of this rank's part of a group, flat fp32; zeros before the first step."""
        return group.moments

    def optimizer_steps(self) -> int:
        """Updates applied so far (bad steps are not counted)."""
        return int(self.shard.steps)

    @property
    def shard(self) -> Shard:
        """What this rank holds."""
        return self._layout.shard

    @torch.no_grad()
    def restore(self, index: int, shard: dict[str, Tensor], steps: int) -> None:
        """Set group `index` from vectors `master`, `ema`, `exp_avg`, `exp_avg_sq` of this rank; then call `refresh`."""
        group = self.groups[index]
        for name, vector in {"master": group.master, "ema": group.ema, **group.moments}.items():
            vector.copy_(shard[name])
        self.shard.steps.fill_(steps)

    @torch.no_grad()
    def refresh(self) -> None:
        """Rebuild student and teacher in the working precision from the fp32 shards."""
        self._layout.fill_copies()
        self._layout.publish()

    def destroy(self) -> None:
        self._layout.destroy()


def _layout(student: Branch, specs: list[GroupSpec], config: EngineConfig, device: torch.device) -> Layout:
    if config.backend == "fsdp2":
        from pipeline.engine.fully_shard import FullyShard

        return FullyShard(student, specs, config, device)
    stage = config.effective_stage()
    if stage == 3:
        from pipeline.engine.zero3 import ParameterShards

        return ParameterShards(student, specs, config, device)
    from pipeline.engine.zero import FlatShards, Replicated

    return (FlatShards if stage else Replicated)(student, specs, config, device)
