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
from pipeline.engine.gradients import Reduction
from pipeline.engine.groups import FlatGroup, GroupSpec, in_interval, offsets
from pipeline.engine.layouts import Layout, Replica, flat_adamw, reduction_dtype, working_dtype
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
        self.before_backward(last)
        self.engine.backward(loss)
        self.after_backward(last)

    def before_backward(self, last: bool) -> None:
        """Tell DeepSpeed whether the step's last backward pass comes."""
        self.engine.set_gradient_accumulation_boundary(last)

    def after_backward(self, last: bool) -> None:
        """What is left to do when a backward pass is over."""

    @contextmanager
    def whole_teacher(self) -> Iterator[Branch]:
        yield cast(Branch, self.teacher)

    def destroy(self) -> None:
        self.engine.destroy()


class Replicated(Zero):
    """ZeRO-0: fp32 weights in one flat vector of ours, whole on every rank. The average is the teacher."""

    def __init__(self, student: Branch, specs: list[GroupSpec], config: EngineConfig, device: torch.device):
        student.to(device)
        teacher = copy.deepcopy(student).eval().requires_grad_(False)
        flat = _flattened(student, specs)
        _make_views(student, specs, flat)
        self.optimizer = flat_adamw(student, specs)
        self.engine = initialize(student, self.optimizer, config, 0)
        named = dict(self.engine.module.named_parameters())
        self._parameters = [named[name] for spec in specs for name in spec.names]
        self._zero = flat.new_zeros(1)
        self.shard = Shard.of(flat, flat.clone())
        self.groups = in_interval(specs, self.shard, 0)
        _make_views(teacher, specs, self.shard.ema)
        self.teacher, self.replica = teacher, Replica(dist.get_rank(), dist.get_world_size())

    def gradients(self) -> list[Tensor]:
        return [self._zero.expand(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self._parameters]

    def forget_gradients(self) -> None:
        self.engine.zero_grad()

    def publish_student(self) -> None:
        """The masters are the weights."""

    def publish_teacher(self) -> None:
        """The average is the teacher."""


class FlatShards(Zero):
    """ZeRO-1/2: one flat vector in the working precision, of which a rank owns an interval; DeepSpeed lays it out.

    Gradients and updates go their own way: DeepSpeed's would reduce all gradients on all ranks, and read and write the
    shard several times more.
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
        length = len(master)
        self._own = slice(dist.get_rank() * length, (dist.get_rank() + 1) * length)
        parameters = self._in_order(specs)
        self._reduction = Reduction(
            parameters, len(self._student), reduction_dtype(config), config.effective_stage() == 2
        )
        self._teacher = self._student.detach().clone()
        if dtype == torch.float32 and dist.get_world_size() == 1 and not self._offloaded:
            master.data = self._student  # the weights are the masters, as at stage 0
            self.shard = Shard.of(master, self._teacher)
        else:
            self.shard = Shard.of(master, master.detach().clone(), *map(self._copy_of, (self._student, self._teacher)))
        self.groups = in_interval(specs, self.shard, self._own.start)
        if exact:
            start_from(self.groups, exact, device)
        _make_views(teacher, specs, self._teacher)
        self.teacher = teacher

    def _in_order(self, specs: list[GroupSpec]) -> list[nn.Parameter]:
        named = dict(self.engine.module.named_parameters())
        parameters = [named[name] for spec in specs for name in spec.names]
        begin = 0
        for parameter in parameters:
            assert parameter.data_ptr() == self._student[begin].data_ptr(), "DeepSpeed lays parameters out in our order"
            begin += parameter.numel()
        return parameters

    def _copy_of(self, flat: Tensor) -> Tensor | None:
        """Where the pass rounds to: the rank's interval, or memory beside an offloaded shard; None: nowhere."""
        if self._offloaded:
            own = flat[self._own].detach()
            return torch.empty_like(own, device="cpu", pin_memory=flat.is_cuda).copy_(own)
        return flat[self._own].detach() if flat.dtype != torch.float32 else None

    def before_backward(self, last: bool) -> None:
        """DeepSpeed reduces nothing."""

    def after_backward(self, last: bool) -> None:
        self._reduction.after_pass(last)

    def finish_backward(self) -> None:
        self._reduction.finish()

    def gradients(self) -> list[Tensor]:
        return self._reduction.gradients()

    def update(self, decision: Decision) -> None:
        if self._offloaded:
            self._reduction.to(self.shard.master.device)
        super().update(decision)

    def forget_gradients(self) -> None:
        self._reduction.forget()

    def publish_student(self) -> None:
        self._publish(self._student, self.shard.student, self.shard.master)

    def publish_teacher(self) -> None:
        self._publish(self._teacher, self.shard.teacher, self.shard.ema)

    def _publish(self, flat: Tensor, rounded: Tensor | None, exact: Tensor) -> None:
        own = exact.detach() if rounded is None else rounded
        if dist.get_world_size() > 1:
            _all_gather(flat, own.to(flat.device, copy=own.data_ptr() == flat[self._own].data_ptr(), non_blocking=True))
        elif own.data_ptr() != flat.data_ptr():
            flat.copy_(own, non_blocking=True)


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
    if stage in (0, 3):  # at the others we reduce ourselves
        out["communication_data_type"] = config.reduce_dtype
    if stage == 3 and (config.precision, config.reduce_dtype) == ("bf16", "fp32"):
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
    named = dict(branch.named_parameters())
    return torch.cat([named[name].detach().reshape(-1) for spec in specs for name in spec.names])


def _make_views(branch: Branch, specs: list[GroupSpec], flat: Tensor) -> None:
    """Make a branch's parameters views of a flat vector."""
    named = dict(branch.named_parameters())
    for spec, begin in zip(specs, offsets(specs), strict=False):
        for name, shape, offset, size in zip(spec.names, spec.shapes, spec.offsets, spec.sizes, strict=True):
            named[name].data = flat[begin + offset : begin + offset + size].view(shape)
