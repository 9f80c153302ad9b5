"""ZeRO-3: weights of student and teacher in shards too, gathered block by block while they are used.

A rank owns an interval of every parameter. The teacher is a second DeepSpeed engine without optimizer. Every rank calls
every block, since gathering is collective; see `ElasticBlock` and `pipeline.elastic.layers` for what that asks of them.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.optimizer import Shard
from pipeline.config import EngineConfig
from pipeline.engine import private
from pipeline.engine.groups import FlatGroup, GroupSpec, Piece
from pipeline.engine.layouts import flat_adamw, working_dtype
from pipeline.engine.sizes import BUCKET, PERSISTENT
from pipeline.engine.zero import Zero, deepspeed, fp32_weights, initialize, settings, start_from
from pipeline.method.tri_branch import Branch

_STAGE = 3
_GATHERING = {
    "stage3_param_persistence_threshold": PERSISTENT,
    "stage3_max_reuse_distance": 0,  # no weight stays gathered from the forward to the backward pass,
    "stage3_prefetch_bucket_size": 0,  # nor is fetched for the backward pass while the forward pass goes on
    "sub_group_size": 10**15,  # one flat vector
    "memory_efficient_linear": False,  # it would replace torch's linear everywhere; our layers see to it themselves
}


class ParameterShards(Zero):
    """The student and its teacher at stage 3.

    The weights are cut up where they were made, on the CPU; a device never holds a whole network.
    """

    def __init__(self, student: Branch, specs: list[GroupSpec], config: EngineConfig, device: torch.device):
        exact = fp32_weights(student) if working_dtype(config) != torch.float32 else None
        teacher = copy.deepcopy(student).eval().requires_grad_(False)
        # the bucket for gradients is allocated once and for all; they come, and weights go, block by block
        bucket = min(BUCKET, max(sum(p.numel() for p in b.parameters()) for b in student.backbone.elastic_blocks()))
        for branch in (student, teacher):
            _cut_up(branch.to(working_dtype(config)), config)
        self.optimizer = flat_adamw(student, specs)
        zero = {**_GATHERING, "reduce_bucket_size": bucket}
        self.engine = initialize(student, self.optimizer, config, _STAGE, **zero)
        self._teacher_engine = initialize(teacher, None, config, _STAGE, **zero)
        self.teacher = self._teacher_engine
        offloaded = config.offload_optimizer is not None
        self._cut_up = private.CutUp(self.engine, offloaded)
        self._lay_out(specs, dict(student.named_parameters()), dict(teacher.named_parameters()), offloaded)
        if exact:
            start_from(self.groups, exact, device)
        in_blocks = {id(p) for block in student.backbone.elastic_blocks() for p in block.parameters()}
        self._late: list[Any] = [p for n, p in student.named_parameters() if id(p) not in in_blocks]
        self._cut_up.hold_back(self._late, True)

    def _lay_out(
        self, specs: list[GroupSpec], student: dict[str, Any], teacher: dict[str, Any], offloaded: bool
    ) -> None:
        names = [name for spec in specs for name in spec.names]
        assert [id(p) for p in self._cut_up.parameters] == [id(student[name]) for name in names]
        master, working = self._cut_up.master, self._cut_up.working
        assert master.dtype == torch.float32
        self._shards = working, working.detach().clone()  # of student and teacher, where they compute
        local = 0
        for name in names:
            length = private.length_of_shard(teacher[name])
            private.place_shard(teacher[name], self._shards[1][local : local + length])
            local += length
        assert len(master) == local
        copies = [
            torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x) if offloaded else x for x in self._shards
        ]
        self.shard = Shard.of(master, master.detach().clone(), *copies)
        self.groups, local = [], 0
        for spec in specs:
            self.groups.append(self._group(spec, [student[name] for name in spec.names], local))
            local = self.groups[-1].place.stop

    def _group(self, spec: GroupSpec, parameters: list[Any], begin: int) -> FlatGroup:
        pieces, local = [], 0
        for offset, size, parameter in zip(spec.offsets, spec.sizes, parameters, strict=True):
            share = private.length_of_shard(parameter)
            start = dist.get_rank() * share
            if start < size:
                pieces.append(Piece(local, offset + start, min(share, size - start)))
            local += share
        return FlatGroup(spec, self.shard, slice(begin, begin + local), pieces)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        super().backward(loss, last)
        self._reduce_late()

    def _reduce_late(self) -> None:
        """Reduce the gradients outside of blocks, in one order on all ranks.

        DeepSpeed reduces a bucket when the next gradient does not fit. A block's gradients come in the order of its
        parameters, those of others as autograd gets to them, which slicing changes: ranks of different widths would
        fill their buckets with different parameters.
        """
        self._cut_up.hold_back(self._late, False)
        self._cut_up.reduce(self._late)
        self._cut_up.hold_back(self._late, True)

    def gradients(self) -> Sequence[Tensor]:
        return self._cut_up.gradients()

    def forget_gradients(self) -> None:
        self._cut_up.forget_gradients()

    def publish_student(self) -> None:
        self._cut_up.let_go()
        self._place(0, self.shard.student)
        self._cut_up.gather_small()

    def publish_teacher(self) -> None:
        self._place(1, self.shard.teacher)
        private.forget_gathered(self._teacher_engine)

    def _place(self, branch: int, rounded: Tensor | None) -> None:
        """Bring what an offloaded shard was rounded to to where it computes."""
        if rounded is not None and rounded is not self._shards[branch]:
            self._shards[branch].copy_(rounded, non_blocking=True)

    @contextmanager
    def whole_teacher(self) -> Iterator[Branch]:
        branch = cast(Branch, self._teacher_engine.module)
        with deepspeed().zero.GatheredParameters(list(branch.parameters())):
            yield branch

    def destroy(self) -> None:
        self._teacher_engine.destroy()
        super().destroy()


def _cut_up(branch: Branch, config: EngineConfig) -> None:
    """Replace every parameter by this rank's shard of it, one after the other; rank 0's values count."""
    ds = deepspeed()
    # gathered as a whole: a rank that skips a block has no hooks of its own inside it
    ds.utils.set_z3_leaf_modules(branch, list({type(b) for b in branch.backbone.elastic_blocks()}))
    ds.zero.Init(module=branch, config_dict_or_path=settings(config, _STAGE))
