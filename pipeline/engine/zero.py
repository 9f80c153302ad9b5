"""ZeRO-0 to 2 by DeepSpeed: under ZeRO-0 we lay out the flat vectors ourselves, under ZeRO-1/2 DeepSpeed does."""

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.optimizer import Shard
from pipeline.config import EngineConfig
from pipeline.elastic.optional import left_out
from pipeline.engine import private
from pipeline.engine.flight import Flight
from pipeline.engine.gradients import Reduction
from pipeline.engine.groups import Buckets, FlatGroup, GroupSpec, in_buckets, offsets
from pipeline.engine.layouts import Layout, Replica, flat_adamw, parameters_of, reduction_dtype, working_dtype
from pipeline.engine.optimizer import Decision
from pipeline.engine.sizes import BUCKET
from pipeline.method.tri_branch import Branch

# torch 2.14 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Zero(Layout):
    """What the ZeRO stages share: a DeepSpeed engine around the student."""

    engine: Any

    @property
    def student(self) -> Any:  # type: ignore[override]
        return self.engine

    @property
    def branch(self) -> Branch:  # type: ignore[override]
        return cast(Branch, self.engine.module)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss)

    @contextmanager
    def whole_teacher(self) -> Iterator[Branch]:
        yield cast(Branch, self.teacher)

    def destroy(self) -> None:
        self.engine.destroy()


class Flat(Zero):
    """Stages at which we reduce the gradients ourselves: DeepSpeed would do so when all of them are there."""

    _reduction: Reduction

    def backward(self, loss: Tensor, last: bool) -> None:
        self._reduction.before_pass(loss, last)
        super().backward(loss, last)
        self._reduction.after_pass()

    def finish_backward(self) -> None:
        self._reduction.finish()

    def gradients(self) -> list[Tensor]:
        return self._reduction.gradients()

    def forget_gradients(self) -> None:
        self._reduction.forget()


class Replicated(Flat):
    """ZeRO-0: fp32 weights in one flat vector of ours, whole on every rank. The average is the teacher."""

    def __init__(self, student: Branch, specs: list[GroupSpec], config: EngineConfig, device: torch.device):
        student.to(device)
        teacher = copy.deepcopy(student).eval().requires_grad_(False)
        flat = _flattened(student, specs)
        _make_views(student, specs, flat)
        self.optimizer = flat_adamw(student, specs)
        self.engine = initialize(student, self.optimizer, config, 0)
        private.reduce_nothing(self.engine)
        buckets = Buckets.of(len(flat), BUCKET)
        self._reduction = Reduction(parameters_of(self.branch, specs), buckets, reduction_dtype(config), False)
        self.shard = Shard.of(flat, flat.clone())
        self.groups = in_buckets(specs, self.shard, Buckets((0, len(flat))))
        _make_views(teacher, specs, self.shard.ema)
        self.teacher, self.replica = teacher, Replica(dist.get_rank(), dist.get_world_size())

    def publish_student(self) -> None:
        """The masters are the weights."""

    def publish_teacher(self) -> None:
        """The average is the teacher."""


class FlatShards(Flat):
    """ZeRO-1/2: one flat vector in the working precision, which DeepSpeed lays out, and of which a rank owns its parts.

    The update goes its own way, too: DeepSpeed's would read and write the shard several times more. Both branches are
    gathered while the next step begins, each until somebody asks for it.
    """

    def __init__(self, student: Branch, specs: list[GroupSpec], config: EngineConfig, device: torch.device):
        dtype = working_dtype(config)
        exact = fp32_weights(student) if dtype != torch.float32 else None
        student.to(device)
        teacher = copy.deepcopy(student).to(dtype).eval().requires_grad_(False)
        self.optimizer = flat_adamw(student, specs)
        self.engine = initialize(student, self.optimizer, config, config.effective_stage())
        self._student, master = private.flat_shards(self.engine)
        self._offloaded = config.offload_optimizer is not None
        self._teacher = self._student.detach().clone()
        self._to_student, self._to_teacher = Flight(), Flight()
        ranks, length = dist.get_world_size(), len(self._student)
        self._buckets = Buckets.of(length, BUCKET if ranks > 1 else length, ranks, dist.get_rank())
        every_pass = config.effective_stage() == 2
        self._reduction = Reduction(self._in_order(specs), self._buckets, reduction_dtype(config), every_pass)
        if dtype == torch.float32 and ranks == 1 and not self._offloaded:
            master.data = self._student  # the weights are the masters, as at stage 0
            self.shard = Shard.of(master, self._teacher)
        else:
            master.data.copy_(self._own(self._student))
            self.shard = Shard.of(master, master.detach().clone(), *map(self._copy_of, (self._student, self._teacher)))
        self.groups = in_buckets(specs, self.shard, self._buckets)
        if exact:
            start_from(self.groups, exact, device)
        _make_views(teacher, specs, self._teacher)
        self._teacher_branch = teacher

    @property
    def student(self) -> Any:  # type: ignore[override]
        self._to_student.land()
        return super().student

    @property
    def branch(self) -> Branch:  # type: ignore[override]
        self._to_student.land()
        return super().branch

    @property
    def teacher(self) -> Branch:  # type: ignore[override]
        self._to_teacher.land()
        return self._teacher_branch

    def _in_order(self, specs: list[GroupSpec]) -> list[nn.Parameter]:
        parameters, begin = parameters_of(self.branch, specs), 0
        for parameter in parameters:
            assert parameter.data_ptr() == self._student[begin].data_ptr(), "DeepSpeed lays parameters out in our order"
            begin += parameter.numel()
        return parameters

    def _own(self, flat: Tensor) -> Tensor:
        """The rank's parts of a vector, one after the other; the vector itself if the rank is alone."""
        parts = [flat[self._buckets.own(bucket)].detach() for bucket in range(len(self._buckets))]
        return parts[0] if self._buckets.ranks == 1 else torch.cat(parts)

    def _copy_of(self, flat: Tensor) -> Tensor | None:
        """Where the pass rounds to: beside the shard, or in the vector itself if the rank is alone; None: nowhere."""
        own = self._own(flat)
        if self._offloaded:
            return torch.empty_like(own, device="cpu", pin_memory=flat.is_cuda).copy_(own)
        return own if flat.dtype != torch.float32 else None

    def update(self, decision: Decision) -> None:
        if self._offloaded:
            self._reduction.to(self.shard.master.device)
        super().update(decision)

    def publish_student(self) -> None:
        self._publish(self._student, self.shard.student, self.shard.master, self._to_student)

    def publish_teacher(self) -> None:
        self._publish(self._teacher, self.shard.teacher, self.shard.ema, self._to_teacher)

    def _publish(self, flat: Tensor, rounded: Tensor | None, exact: Tensor, flight: Flight) -> None:
        flight.land()
        own = exact.detach() if rounded is None else rounded
        if self._buckets.ranks > 1:
            own = own.to(flat.device, non_blocking=True)
            for bucket in range(len(self._buckets)):
                part = own[self._buckets.local(bucket)]
                flight.add(_all_gather(flat[self._buckets.whole(bucket)], part, async_op=True), part)
        elif own.data_ptr() != flat.data_ptr():
            flat.copy_(own, non_blocking=True)

    def destroy(self) -> None:
        self._to_student.land()
        self._to_teacher.land()
        super().destroy()


@torch.no_grad()
def start_from(groups: list[FlatGroup], weights: dict[str, Tensor], device: torch.device) -> None:
    """Set masters and EMA to rank 0's fp32 weights, of which DeepSpeed keeps the rounding to bf16. Collective."""
    for group in groups:
        flat = torch.cat([weights[name].reshape(-1) for name in group.spec.names]).to(device)
        dist.broadcast(flat, 0)
        for piece in group.pieces:
            group.master[piece.here].copy_(flat[piece.there])
        group.ema.copy_(group.master)


def fp32_weights(student: Branch) -> dict[str, Tensor]:
    """A copy on the CPU, for `start_from`."""
    return {name: p.detach().cpu().clone() for name, p in student.named_parameters()}


def settings(config: EngineConfig, stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # it wants one, and uses it for figures that nobody reads
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # per module, by us
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the whole device three times a step
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    if config.precision == "bf16":
        out["bf16"] = {"enabled": True}
    if stage == 3:  # at the others we reduce ourselves
        out["communication_data_type"] = config.reduce_dtype
        if (config.precision, config.reduce_dtype) == ("bf16", "fp32"):
            out["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {
            "device": config.offload_optimizer,
            "pin_memory": torch.cuda.is_available(),
        }
        out["zero_force_ds_cpu_optimizer"] = False  # its own is compiled at first use, by a compiler that may be absent
    return out


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: EngineConfig,
    stage: int,
    **zero: Any,
) -> Any:
    """DeepSpeed's engine around a model.

    Args:
        model: on its device, except at stage 3.
        optimizer: over its parameters; None for a model that is not trained.
        config: precision and offloading.
        stage: of ZeRO.
        zero: further entries of `zero_optimization`.
    """
    chosen = settings(config, stage)
    chosen["zero_optimization"] |= zero
    module = deepspeed()
    with _without_services():
        engine, *_ = module.initialize(model=model, optimizer=optimizer, config=chosen)
    engine.train(optimizer is not None)
    return engine


def deepspeed() -> Any:
    """DeepSpeed, imported late (it takes a second) and kept quiet."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    with _without_services():
        import deepspeed
    from deepspeed.utils import logger

    private.keep_from_compiling(deepspeed)
    logger.setLevel(logging.ERROR)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # DeepSpeed's own calls
        warnings.filterwarnings("ignore", message=f".*{name}", category=FutureWarning)
    return deepspeed


def _without_services() -> AbstractContextManager[None]:
    """What DeepSpeed imports for its autotuner, and for kernels that it has for GPUs only."""
    return left_out("mlflow", *([] if torch.cuda.is_available() else ["triton"]))


def _flattened(branch: Branch, specs: list[GroupSpec]) -> Tensor:
    """A copy of a branch's parameters as one flat vector."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters_of(branch, specs)])


def _make_views(branch: Branch, specs: list[GroupSpec], flat: Tensor) -> None:
    """Make a branch's parameters views of a flat vector."""
    named = dict(branch.named_parameters())
    for spec, begin in zip(specs, offsets(specs), strict=False):
        for name, shape, offset, size in zip(spec.names, spec.shapes, spec.offsets, spec.sizes, strict=True):
            named[name].data = flat[begin + offset : begin + offset + size].view(shape)
