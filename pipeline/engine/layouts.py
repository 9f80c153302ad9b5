"""How an engine may lay out weights, gradients and optimizer state over the ranks.

All that optimizer and EMA hold is flat fp32 vectors of which a rank owns a shard: under ZeRO-0 the whole, under
ZeRO-1/2 an interval (`zero`), under ZeRO-3 (`zero3`) and FSDP2 (`fully_shard`) a part of every parameter. One pass
updates the shard (`optimizer`). The checkpoint is made of these vectors, parameter group by parameter group.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels.optimizer import Shard
from pipeline.config import EngineConfig
from pipeline.engine.groups import FlatGroup, GroupSpec
from pipeline.engine.optimizer import Decision, FlatAdamW
from pipeline.method.tri_branch import Branch


class Replica(NamedTuple):
    """Which of how many copies of a shard a rank holds."""

    number: int = 0
    total: int = 1


class Layout(ABC):
    """Student and teacher as one engine keeps them.

    Attributes:
        branch: the student itself; what its parameters hold between steps is the engine's own affair.
        student, teacher: called like the `Branch` that they are or wrap. All three are to be had anew for each step:
            weights may still be under way, and have arrived when this returns them.
        optimizer: what updates the shard.
        shard: what this rank holds of weights, average and moments.
        groups: in the order of the flat vector of everything.
        replica: of the shard, and of the averaged gradients.
    """

    branch: Branch
    student: Callable[..., Any]
    teacher: Callable[..., Any]
    optimizer: FlatAdamW
    shard: Shard
    groups: list[FlatGroup]
    replica = Replica()

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """A backward pass of a step, its last or not."""

    def finish_backward(self) -> None:  # noqa: B027  (not every layout has something to do)
        """Complete the reduction after the last backward pass: where a fast rank waits for a slow one."""

    @abstractmethod
    def gradients(self) -> Sequence[Tensor]:
        """Averaged gradients of this rank's shard, one after the other, after the last backward pass."""

    @abstractmethod
    def forget_gradients(self) -> None:
        """Begin the next step as if this one's backward passes had not been."""

    def update(self, decision: Decision) -> None:
        """Update the shard, or leave it as it is."""
        self.optimizer.decide(decision.to(self.shard.master.device), self.gradients())
        self.optimizer.step()
        self.forget_gradients()

    def publish(self) -> None:
        """Rebuild both branches on every rank from the shards, the one first that a step uses first."""
        self.publish_teacher()
        self.publish_student()

    @abstractmethod
    def publish_student(self) -> None:
        """Begin to rebuild every rank's working weights of the student from the shards."""

    @abstractmethod
    def publish_teacher(self) -> None:
        """Begin to rebuild the teacher on every rank from the shards."""

    def fill_copies(self) -> None:
        """Round the shard anew, after its values were set."""
        for copy_, exact in ((self.shard.student, self.shard.master), (self.shard.teacher, self.shard.ema)):
            if copy_ is not None:
                copy_.copy_(exact)

    @abstractmethod
    def whole_teacher(self) -> AbstractContextManager[Branch]:
        """The teacher with all of its weights on every rank, whose values must not be changed. Collective."""

    def destroy(self) -> None:  # noqa: B027
        """Let go of what outlives the objects."""


def working_dtype(config: EngineConfig) -> torch.dtype:
    """Of the weights and activations."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def reduction_dtype(config: EngineConfig) -> torch.dtype:
    """In which gradients are added up over ranks."""
    return torch.bfloat16 if config.reduce_dtype == "bf16" else torch.float32


def flat_adamw(student: Branch, specs: list[GroupSpec]) -> FlatAdamW:
    """The optimizer, over all parameters as one group."""
    return FlatAdamW(parameters_of(student, specs))


def parameters_of(branch: Branch, specs: list[GroupSpec]) -> list[nn.Parameter]:
    """In the order of the flat vector of everything."""
    named = dict(branch.named_parameters())
    return [named[name] for spec in specs for name in spec.names]
