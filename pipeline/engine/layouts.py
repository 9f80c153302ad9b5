"""How each ZeRO stage lays out weights, gradients and optimizer state over the ranks.

Everything the optimizer and the EMA hold is, per parameter group, one flat fp32 vector of which a rank owns a shard:
under ZeRO-0 we lay it out and the shard is the whole, under ZeRO-1/2 it is an interval, under ZeRO-3 (`zero3`) it is an
interval of every parameter. The checkpoint is made of these.
"""

import copy
import inspect
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import EngineConfig
from pipeline.elastic.compiler import compiler_deferred
from pipeline.engine.groups import FlatGroup, GroupSpec, Piece
from pipeline.engine.sizes import BUCKET
from pipeline.method.tri_branch import Branch

# torch 2.14 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Layout(ABC):
    """Student and teacher as one ZeRO stage keeps them.

    Attributes:
        engine: DeepSpeed's, around the student.
        teacher: called like the `Branch` it is or wraps.
        groups: in the order of the optimizer's parameter groups.
        replicated: every rank holds all of every vector, and of the averaged gradients.
    """

    engine: Any
    teacher: Any
    groups: list[FlatGroup]
    replicated = False

    @property
    def adam(self) -> torch.optim.Optimizer:
        """torch's optimizer under DeepSpeed's."""
        return self.engine.optimizer.optimizer

    def window(self) -> AbstractContextManager[None]:
        """Around all backward passes of a step."""
        return nullcontext()

    def before_backward(self, last: bool) -> None:
        """Tell DeepSpeed whether the step's last backward pass comes."""
        self.engine.set_gradient_accumulation_boundary(last)

    def after_backward(self) -> None:  # noqa: B027  (most stages have nothing to do)
        """What is left to do when a backward pass is over."""

    @abstractmethod
    def gradients(self) -> list[Sequence[Tensor]]:
        """This rank's averaged gradients per group, after the last backward pass."""

    @abstractmethod
    def forget_gradients(self) -> None:
        """Begin the next step as if this one's backward passes had not been."""

    @abstractmethod
    def publish_student(self) -> None:
        """Rebuild every rank's working weights of the student from the master shards."""

    @abstractmethod
    def publish_teacher(self) -> None:
        """Rebuild the teacher on every rank from `FlatGroup.teacher`."""

    @contextmanager
    def whole_teacher(self) -> Iterator[Branch]:
        """The teacher with all of its weights on every rank, whose values must not be changed. Collective."""
        yield self.teacher

    def destroy(self) -> None:
        self.engine.destroy()


class Replicated(Layout):
    """ZeRO-0: fp32 weights in flat vectors of ours, whole on every rank."""

    replicated = True

    def __init__(self, student: Branch, specs: list[GroupSpec], config: EngineConfig, device: torch.device):
        student.to(device)
        teacher = copy.deepcopy(student).eval().requires_grad_(False)
        initial = dict(student.named_parameters())
        flats = [torch.cat([initial[name].detach().reshape(-1) for name in spec.names]) for spec in specs]
        _make_views(student, specs, flats)
        self.engine = initialize(student, adamw(student, specs, config, device), config, 0)
        self._named: dict[str, nn.Parameter] = dict(self.engine.module.named_parameters())
        self.groups = []
        for spec, flat in zip(specs, flats, strict=True):
            params: list[tuple[Tensor, slice]] = [
                (self._named[name], slice(offset, offset + size))
                for name, offset, size in zip(spec.names, spec.offsets, spec.sizes, strict=True)
            ]
            everything = [Piece(0, 0, spec.numel)]
            self.groups.append(FlatGroup(spec, flat, flat.clone(), flat.clone(), everything, params))
        _make_views(teacher, specs, [group.teacher for group in self.groups])
        self.teacher = teacher

    @property
    def adam(self) -> torch.optim.Optimizer:
        return self.engine.optimizer

    def gradients(self) -> list[Sequence[Tensor]]:
        return [[p.grad for n in g.spec.names if (p := self._named[n]).grad is not None] for g in self.groups]

    def forget_gradients(self) -> None:
        self.engine.zero_grad()

    def publish_student(self) -> None:
        """The masters are the weights."""

    def publish_teacher(self) -> None:
        """The shard is the whole."""


class Sharded(Layout):
    """ZeRO-1 to 3: DeepSpeed owns the masters and averages the gradients into shards."""

    def __init__(self, engine: Any, config: EngineConfig):
        self.engine, self._zero = engine, engine.optimizer
        self._offloaded = config.offload_optimizer is not None

    def gradients(self) -> list[Sequence[Tensor]]:
        if self._offloaded:
            return [[cast(Tensor, group.master.grad)] for group in self.groups]
        return [self._zero.averaged_gradients.get(i) or () for i in range(len(self.groups))]


class FlatShards(Sharded):
    """ZeRO-1/2: DeepSpeed's flat vector per group, of which a rank owns one interval."""

    def __init__(self, student: Branch, specs: list[GroupSpec], config: EngineConfig, device: torch.device):
        exact = fp32_weights(student) if working_dtype(config) != torch.float32 else None
        student.to(device)
        teacher = copy.deepcopy(student).to(working_dtype(config)).eval().requires_grad_(False)
        optimizer = adamw(student, specs, config, device)
        super().__init__(initialize(student, optimizer, config, config.effective_stage()), config)
        self._student_flats: list[Tensor] = self._zero.bit16_groups_flat
        self._teacher_flats = [flat.detach().clone() for flat in self._student_flats]
        self.groups = [self._group(i, spec) for i, spec in enumerate(specs)]
        if exact:
            start_from(self.groups, exact, device)
        _make_views(teacher, specs, self._teacher_flats)
        self.teacher = teacher

    def _group(self, index: int, spec: GroupSpec) -> FlatGroup:
        named, flat = dict(self.engine.module.named_parameters()), self._student_flats[index]
        for name, offset in zip(spec.names, spec.offsets, strict=True):
            assert named[name].data_ptr() == flat[offset].data_ptr(), "DeepSpeed lays parameters out in our order"
        master = self._zero.param_groups[index]["params"][0]
        assert master.dtype == torch.float32
        assert len(master) * dist.get_world_size() == len(flat)
        start = dist.get_rank() * len(master)
        length = min(len(master), spec.numel - start)
        pieces = [Piece(0, start, length)] if length > 0 else []
        teacher = self._teacher_flats[index][start : start + len(master)]
        return FlatGroup(spec, master, master.detach().clone(), teacher, pieces, [(master, slice(None))])

    def window(self) -> AbstractContextManager[None]:
        """Reduce once at the end in a fixed order, so that ranks may train different blocks.

        Two bare backward calls would be silently wrong.
        """
        return self.engine.coalesce_grad_reduction()

    def before_backward(self, last: bool) -> None:
        """The window sees to it."""

    def gradients(self) -> list[Sequence[Tensor]]:
        if self._offloaded:
            self._zero._wait_for_offload_copies()  # they come from the device on a stream of their own
        return super().gradients()

    def forget_gradients(self) -> None:
        # what DeepSpeed's own overflow branch clears
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        if self._offloaded:
            zero.reset_cpu_buffers()
            zero.micro_step_id = -1  # or the next step's gradients would be added to these
        for i in zero.averaged_gradients:
            zero.averaged_gradients[i] = None
            zero.all_grad_tensors[i] = None

    def publish_student(self) -> None:
        for group, flat in zip(self.groups, self._student_flats, strict=True):
            start = dist.get_rank() * len(group.master)
            flat[start : start + len(group.master)].copy_(group.master)
            _spread(flat, start, len(group.master))

    def publish_teacher(self) -> None:
        for group, flat in zip(self.groups, self._teacher_flats, strict=True):
            _spread(flat, dist.get_rank() * len(group.master), len(group.master))


class AdamW(torch.optim.AdamW):
    """torch's, without its wrappers: they import torch's compiler, to tell it what not to compile."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def working_dtype(config: EngineConfig) -> torch.dtype:
    """Of the weights and activations."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def adamw(student: Branch, specs: list[GroupSpec], config: EngineConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the groups; `Engine.apply` sets learning rates and weight decay before every step.

    Its state is on `device`, or on the CPU if it is offloaded. There the fused one would take half the time, but leave
    a ResNet twice as far from fp64.
    """
    named = dict(student.named_parameters())
    fused = device.type == "cuda" and not config.offload_optimizer
    groups = [{"params": [named[n] for n in spec.names], "lr": 0.0, "weight_decay": 0.0} for spec in specs]
    return AdamW(groups, betas=(0.9, 0.999), fused=fused)


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
        # `agree` has looked at every norm: another pass over the gradients, an all-reduce and a wait would find nothing
        out["bf16"] = {"enabled": True, "check_grad_overflow": False}
    if stage in (1, 2) and not config.offload_optimizer:
        # ours are per module; DeepSpeed's take an all-reduce, a pass in fp64 and a wait for the device per group
        zero["compute_grad_norm"] = False
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
    engine, *_ = deepspeed().initialize(model=model, optimizer=optimizer, config=chosen)
    engine.train(optimizer is not None)
    return engine


def deepspeed() -> Any:
    """DeepSpeed, imported late (it takes a second) and kept quiet."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    import deepspeed
    from deepspeed.utils import logger

    with compiler_deferred(), suppress(ImportError):
        # DeepSpeed will ask whether the optimizer is this one, whose functions are to be compiled
        import deepspeed.runtime.zero.muon.muon_optimizer

    logger.setLevel(logging.ERROR)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # DeepSpeed's own calls
        warnings.filterwarnings("ignore", message=f".*{name}", category=FutureWarning)
    # none of its own operators is needed; it would run a C compiler to see which it could build, and build one
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _spread(flat: Tensor, start: int, length: int) -> None:
    """All-gather each rank's interval of a flat vector."""
    if dist.get_world_size() > 1:
        _all_gather(flat, flat[start : start + length].clone())


def _make_views(branch: Branch, specs: list[GroupSpec], flats: list[Tensor]) -> None:
    """Make a branch's parameters views of flat vectors."""
    named = dict(branch.named_parameters())
    for spec, flat in zip(specs, flats, strict=True):
        for name, shape, offset, size in zip(spec.names, spec.shapes, spec.offsets, spec.sizes, strict=True):
            named[name].data = flat[offset : offset + size].view(shape)
