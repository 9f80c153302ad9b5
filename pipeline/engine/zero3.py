"""ZeRO-3: weights of student and teacher in shards too, gathered block by block while they are used.

A rank owns an interval of every parameter. The teacher is a second DeepSpeed engine without optimizer. Every rank calls
every block, since gathering is collective; see `ElasticBlock` and `pipeline.elastic.layers` for what that asks of them.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist

from pipeline.config import EngineConfig
from pipeline.engine.groups import FlatGroup, GroupSpec, Piece
from pipeline.engine.layouts import (
    Sharded,
    adamw,
    deepspeed,
    fp32_weights,
    initialize,
    settings,
    start_from,
    working_dtype,
)
from pipeline.engine.sizes import BUCKET, PERSISTENT
from pipeline.method.tri_branch import Branch

_STAGE = 3
_GATHERING = {
    "stage3_param_persistence_threshold": PERSISTENT,
    "stage3_max_reuse_distance": 0,  # no weight stays gathered from the forward to the backward pass,
    "stage3_prefetch_bucket_size": 0,  # nor is fetched for the backward pass while the forward pass goes on
    "sub_group_size": 10**15,  # one flat vector per parameter group
    "memory_efficient_linear": False,  # it would replace torch's linear everywhere; our layers see to it themselves
}


class ParameterShards(Sharded):
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
        optimizer = adamw(student, specs, config, device)
        zero = {**_GATHERING, "reduce_bucket_size": bucket}
        super().__init__(initialize(student, optimizer, config, _STAGE, **zero), config)
        self._teacher_engine = initialize(teacher, None, config, _STAGE, **zero)
        self.teacher = self._teacher_engine
        named = (dict(student.named_parameters()), dict(teacher.named_parameters()))
        self.groups = [self._group(i, spec, *named) for i, spec in enumerate(specs)]
        if exact:
            start_from(self.groups, exact, device)
        in_blocks = {id(p) for block in student.backbone.elastic_blocks() for p in block.parameters()}
        self._late: list[Any] = [p for p in named[0].values() if id(p) not in in_blocks]
        self._hold_back(True)

    def _group(self, index: int, spec: GroupSpec, student: dict[str, Any], teacher: dict[str, Any]) -> FlatGroup:
        params = [student[name] for name in spec.names]
        assert [id(p) for p in self._zero.fp16_groups[index]] == [id(p) for p in params]
        master = self._zero.fp32_partitioned_groups_flat[index]
        pieces, local = [], 0
        for offset, size, parameter in zip(spec.offsets, spec.sizes, params, strict=True):
            share = parameter.ds_tensor.ds_numel
            begin = dist.get_rank() * share
            if begin < size:
                pieces.append(Piece(local, offset + begin, min(share, size - begin)))
            local += share
        assert master.dtype == torch.float32
        assert len(master) == local
        copies = self._zero.fp16_partitioned_groups_flat[index].detach().clone()
        local = 0
        for name in spec.names:
            shard = teacher[name].ds_tensor
            shard.data = copies[local : local + shard.ds_numel]
            local += shard.ds_numel
        return FlatGroup(spec, master, master.detach().clone(), copies, pieces, [(master, slice(None))])

    def after_backward(self) -> None:
        """Reduce the gradients outside of blocks, in one order on all ranks.

        DeepSpeed reduces a bucket when the next gradient does not fit. A block's gradients come in the order of its
        parameters, those of others as autograd gets to them, which slicing changes: ranks of different widths would
        fill their buckets with different parameters.
        """
        self._hold_back(False)
        for parameter in self._late:
            self._zero.reduce_ready_partitions_and_remove_grads(parameter)
        self._hold_back(True)
        self._zero.independent_gradient_partition_epilogue()

    def _hold_back(self, held: bool) -> None:
        for parameter in self._late:
            parameter.ds_grad_is_ready = not held

    def forget_gradients(self) -> None:
        # what DeepSpeed's own step does when it finds an overflow
        self._zero._pre_step()
        self._zero._partition_all_parameters()
        self._zero._overflow_clean_up(None)

    def publish_student(self) -> None:
        for group, flat in zip(self.groups, self._zero.fp16_partitioned_groups_flat, strict=True):
            flat.copy_(group.master.detach())
        self._zero._partition_all_parameters()  # what is gathered is old

    def publish_teacher(self) -> None:
        self._teacher_engine.optimizer.empty_partition_cache()

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
