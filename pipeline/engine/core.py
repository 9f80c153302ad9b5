"""The engine: the student under DeepSpeed, its optimizer step, and the EMA teacher."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.ema import ema_update_
from pipeline.config import EngineConfig, OptimConfig
from pipeline.engine.groups import MODULES, FlatGroup, GroupSpec, parameter_groups
from pipeline.engine.layouts import FlatShards, Layout, Replicated
from pipeline.method.schedules import StepValues
from pipeline.method.tri_branch import Branch

_ADAM_STATE = ("exp_avg", "exp_avg_sq")


class Engine:
    """The student under DeepSpeed with its teacher.

    Use it step by step:

        with engine.backward_window():
            ... engine.student(...); engine.backward(loss) ... twice
        squares = engine.gradient_squares()
        engine.apply(values, norms) or engine.discard()

    Args:
        student: a `Branch` on the CPU; its weights are broadcast from rank 0.
        optim: multipliers of the learning rate, and where to clip.
        config: how to compute.
        device: where it trains.

    Attributes:
        student, teacher: called like `Branch`.
        groups: the parameter groups, as this rank holds them.
    """

    def __init__(self, student: Branch, optim: OptimConfig, config: EngineConfig, device: torch.device):
        self.config, self.device = config, device
        self._clip = optim.clip_grad
        self._passes_left = 0
        self._layout = _layout(student, parameter_groups(student, optim), config, device)
        self.engine = self._layout.engine
        self.student, self.teacher = self._layout.engine, self._layout.teacher
        self.optimizer = self.engine.optimizer
        self.groups = self._layout.groups

    @contextmanager
    def backward_window(self, passes: int = 2) -> Iterator[None]:
        """All backward passes of one step; gradients are averaged over the ranks when it closes."""
        self._passes_left = passes
        with self._layout.window():
            yield
        assert self._passes_left == 0, "a step has a fixed number of backward passes"

    def backward(self, loss: Tensor) -> None:
        """One of the window's backward passes.

        Raises:
            RuntimeError: there is no window, or it had all its passes.
        """
        if not self._passes_left:
            raise RuntimeError("backward outside of a backward_window: its gradients would be lost or counted twice")
        self._passes_left -= 1
        self._layout.before_backward(last=self._passes_left == 0)
        self.engine.backward(loss)
        self._layout.after_backward()

    @torch.no_grad()
    def gradient_squares(self) -> Tensor:
        """Squared gradient norm per entry of `MODULES`, fp32 `[2]`; its sum over the ranks is the global one."""
        squares = torch.zeros(len(MODULES), device=self.device)
        for group, gradients in zip(self.groups, self._layout.gradients(), strict=True):
            if gradients:
                norms = torch.stack(torch._foreach_norm([g.float() for g in gradients]))
                squares[MODULES.index(group.spec.module)] += norms.square().sum().to(self.device)
        return squares / dist.get_world_size() if self.replicated else squares

    @torch.no_grad()
    def apply(
        self, values: StepValues, gradient_norms: Tensor, lap: Callable[[str], None] = lambda phase: None
    ) -> None:
        """Clip, update the weights, then move the teacher.

        Args:
            values: learning rate, weight decay and momentum of this step.
            gradient_norms: global norm per entry of `MODULES`.
            lap: told the name of each part when it is done.
        """
        factors = (self._clip / (gradient_norms + 1e-6)).clamp(max=1.0)
        for group, gradients in zip(self.groups, self._layout.gradients(), strict=True):
            if gradients:
                factor = factors[MODULES.index(group.spec.module)]
                torch._foreach_mul_(list(gradients), factor.to(gradients[0].device))
        for group, settings in zip(self.groups, self.optimizer.param_groups, strict=True):
            frozen = (group.spec.prototypes and values.prototypes_frozen) or (
                group.spec.module == "backbone" and values.backbone_frozen
            )
            settings["lr"] = 0.0 if frozen else values.lr * group.spec.lr_scale
            settings["weight_decay"] = values.weight_decay if group.spec.decayed and not frozen else 0.0
        self.engine.step()
        lap("optimizer")
        self._update_teacher(values.momentum)
        lap("ema")

    def discard(self) -> None:
        """Forget the gradients of a bad step; weights, moments and teacher stay as they were."""
        self._layout.forget_gradients()

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all of every vector."""
        return self._layout.replicated

    def whole_teacher(self) -> AbstractContextManager[Branch]:
        """The teacher as a `Branch` with all of its weights on every rank, to be read only. Collective."""
        return self._layout.whole_teacher()

    def moments(self, group: FlatGroup) -> dict[str, Tensor]:
        """AdamW's moments of this rank's shard, as flat fp32 vectors; zeros before the first step."""
        out = {}
        for key in _ADAM_STATE:
            out[key] = torch.zeros_like(group.master)
            for parameter, place in group.params:
                state = self._layout.adam.state.get(parameter, {})
                if key in state:
                    out[key][place] = state[key].reshape(-1)
        return out

    def optimizer_steps(self) -> int:
        """Updates applied so far (bad steps are not counted)."""
        for state in self._layout.adam.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    @torch.no_grad()
    def restore(self, index: int, shard: dict[str, Tensor], steps: int) -> None:
        """Set the shard of group `index` from vectors `master`, `ema`, `exp_avg`, `exp_avg_sq`; then call `refresh`."""
        group = self.groups[index]
        group.master.copy_(shard["master"])
        group.ema.copy_(shard["ema"])
        device = group.master.device  # a fused AdamW wants its counter there, the plain one on the CPU
        for parameter, place in group.params:
            self._layout.adam.state[parameter] = {
                "step": torch.tensor(float(steps), device=device),
                **{key: shard[key][place].to(device).view_as(parameter).clone() for key in _ADAM_STATE},
            }

    @torch.no_grad()
    def refresh(self) -> None:
        """Rebuild student and teacher in the working precision from the fp32 shards."""
        self._layout.publish_student()
        for group in self.groups:
            group.teacher.copy_(group.ema)
        self._layout.publish_teacher()

    def destroy(self) -> None:
        self._layout.destroy()

    def _update_teacher(self, momentum: float) -> None:
        # an offloaded state is on the CPU, where no kernel but the eager one runs
        impl = "eager" if self.config.offload_optimizer else self.config.kernels.ema
        masters = [g.master.detach() for g in self.groups]
        ema_update_([g.ema for g in self.groups], masters, momentum, [g.teacher for g in self.groups], impl=impl)
        self._layout.publish_teacher()


def _layout(student: Branch, specs: list[GroupSpec], config: EngineConfig, device: torch.device) -> Layout:
    stage = config.effective_stage()
    if stage == 3:
        from pipeline.engine.zero3 import ParameterShards

        return ParameterShards(student, specs, config, device)
    return (FlatShards if stage else Replicated)(student, specs, config, device)
