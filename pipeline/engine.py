"""DeepSpeed around the student, and the EMA teacher that follows its fp32 master weights.

Everything the optimizer and the EMA hold is, per parameter group, one flat fp32 vector of which a rank owns a shard:
under ZeRO-1/2 DeepSpeed lays it out so, under ZeRO-0 we do and the shard is the whole. The checkpoint is made of these.
"""

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.ema import ema_update_
from pipeline.config import ExperimentConfig
from pipeline.schedules import StepValues
from pipeline.tri_branch import Branch

# torch 2.14 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

MODULES = ("backbone", "heads")  # gradients are clipped module by module
_ADAM_STATE = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class GroupSpec:
    """Parameters that share their multipliers.

    Attributes:
        module: entry of `MODULES`.
        lr_scale: multiplier of the learning rate.
        decayed: whether weight decay applies.
        prototypes: whether they freeze in the first epochs.
        names: parameter names, in the order of the flat vector.
    """

    module: str
    lr_scale: float
    decayed: bool
    prototypes: bool
    names: tuple[str, ...]


def parameter_groups(student: Branch, config: ExperimentConfig) -> list[GroupSpec]:
    """Group the student's parameters by learning-rate multiplier, weight decay and module.

    The multiplier is `layer_decay ** (layers - layer)`, times `patch_embed_lr_scale` for the patch embedding.
    """
    backbone, optim = student.backbone, config.optim
    groups: dict[tuple[str, float, bool, bool], list[str]] = {}
    for name, parameter in student.named_parameters():
        module, _, inner = name.partition(".")
        if module == "backbone":
            scale = optim.layer_decay ** (backbone.num_layers - backbone.layer_id(inner))
            if backbone.is_patch_embed(inner):
                scale *= optim.patch_embed_lr_scale
            decayed, prototypes = not backbone.no_weight_decay(inner), False
        else:
            scale, decayed, prototypes = 1.0, parameter.ndim > 1, "prototypes" in inner
        groups.setdefault((module, scale, decayed, prototypes), []).append(name)
    return [GroupSpec(*key, names=tuple(names)) for key, names in groups.items()]


@dataclass
class FlatGroup:
    """One parameter group as flat fp32 vectors; a rank holds elements [start, start + len(master)) of them.

    Attributes:
        spec: what the group is.
        shapes, offsets: of the parameters, within the vector.
        master: this rank's shard of the weights, fp32.
        ema: its shard of the teacher's weights, fp32.
        teacher: the teacher's whole vector in the working precision.
        start: first element of the shard.
        params: the optimizer's tensors that make up `master`, with their places in it.
    """

    spec: GroupSpec
    shapes: list[tuple[int, ...]]
    offsets: list[int]
    master: Tensor
    ema: Tensor
    teacher: Tensor
    start: int
    params: list[tuple[Tensor, slice]] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Elements without padding."""
        return self.offsets[-1] + torch.Size(self.shapes[-1]).numel()


class Engine:
    """The student under DeepSpeed with its teacher.

    Use it step by step:

        with engine.backward_window():
            ... engine.student(...); engine.backward(loss) ... twice
        squares = engine.gradient_squares()
        engine.apply(values, norms) or engine.discard()

    Args:
        student: a `Branch`; its weights are broadcast from rank 0.
        config: the experiment.
        device: where it trains.
    """

    def __init__(self, student: Branch, config: ExperimentConfig, device: torch.device):
        self.config, self.device = config, device
        self.stage = config.engine.effective_stage()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._passes_left = 0
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        student.to(device)
        specs = parameter_groups(student, config)
        self.teacher: Branch = copy.deepcopy(student).to(dtype).eval().requires_grad_(False)
        named = dict(student.named_parameters())
        if self.stage == 0:
            flats = [_flatten(student, spec.names) for spec in specs]
        optimizer = torch.optim.AdamW(
            [{"params": [named[n] for n in spec.names], "lr": 0.0, "weight_decay": 0.0} for spec in specs],
            betas=(0.9, 0.999),
            fused=device.type == "cuda",
        )
        self.engine = _initialize(student, optimizer, config, self.stage)
        self.student = self.engine
        self.optimizer = self.engine.optimizer
        named = dict(self.engine.module.named_parameters())
        if self.stage == 0:
            self.groups = [self._replicated(spec, named, flat) for spec, flat in zip(specs, flats, strict=True)]
        else:
            self.groups = [self._sharded(i, spec, named) for i, spec in enumerate(specs)]
        self._attach_teacher()

    @contextmanager
    def backward_window(self, passes: int = 2) -> Iterator[None]:
        """All backward passes of one step; gradients are averaged over the ranks when it closes.

        ZeRO-1/2 reduce once at the end in a fixed order, so that ranks may train different blocks. Two bare backward
        calls would be silently wrong.
        """
        self._passes_left = passes
        with self.engine.coalesce_grad_reduction() if self.stage else nullcontext():
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
        if self.stage == 0:
            self.engine.set_gradient_accumulation_boundary(self._passes_left == 0)
        self.engine.backward(loss)

    @torch.no_grad()
    def gradient_squares(self) -> Tensor:
        """Squared gradient norm per entry of `MODULES`, fp32 `[2]`; its sum over the ranks is the global one."""
        squares = torch.zeros(len(MODULES), device=self.device)
        for group, gradients in zip(self.groups, self._gradients(), strict=True):
            if gradients:
                norms = torch.stack(torch._foreach_norm([g.float() for g in gradients]))
                squares[MODULES.index(group.spec.module)] += norms.square().sum()
        return squares / self.world_size if self.stage == 0 else squares

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
        factors = (self.config.optim.clip_grad / (gradient_norms + 1e-6)).clamp(max=1.0)
        for group, gradients in zip(self.groups, self._gradients(), strict=True):
            if gradients:
                torch._foreach_mul_(gradients, factors[MODULES.index(group.spec.module)])
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
        if self.stage == 0:
            self.engine.zero_grad()
        else:
            # what DeepSpeed's own overflow branch clears
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer._release_preflattened_grad_buffers()
            for i in self.optimizer.averaged_gradients:
                self.optimizer.averaged_gradients[i] = None
                self.optimizer.all_grad_tensors[i] = None

    def moments(self, group: FlatGroup) -> dict[str, Tensor]:
        """AdamW's moments of this rank's shard, as flat fp32 vectors; zeros before the first step."""
        out = {}
        for key in _ADAM_STATE:
            out[key] = torch.zeros_like(group.master)
            for parameter, place in group.params:
                state = self._adam().state.get(parameter, {})
                if key in state:
                    out[key][place] = state[key].reshape(-1)
        return out

    def optimizer_steps(self) -> int:
        """Updates applied so far (bad steps are not counted)."""
        for state in self._adam().state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    @torch.no_grad()
    def restore(self, index: int, shard: dict[str, Tensor], steps: int) -> None:
        """Set the shard of group `index` from vectors `master`, `ema`, `exp_avg`, `exp_avg_sq`; then call `refresh`."""
        group = self.groups[index]
        group.master.copy_(shard["master"])
        group.ema.copy_(shard["ema"])
        for parameter, place in group.params:
            self._adam().state[parameter] = {
                "step": torch.tensor(float(steps), device=self.device if self.device.type == "cuda" else "cpu"),
                **{key: shard[key][place].to(self.device).view_as(parameter).clone() for key in _ADAM_STATE},
            }

    @torch.no_grad()
    def refresh(self) -> None:
        """Rebuild student and teacher in the working precision from the fp32 shards."""
        if self.stage:
            for group, flat in zip(self.groups, self.optimizer.bit16_groups_flat, strict=True):
                flat[group.start : group.start + len(group.master)].copy_(group.master)
                self._all_gather(flat, group)
        for group in self.groups:
            group.teacher[group.start : group.start + len(group.ema)].copy_(group.ema)
            self._all_gather(group.teacher, group)

    def destroy(self) -> None:
        self.engine.destroy()

    def _update_teacher(self, momentum: float) -> None:
        shards = [g.teacher[g.start : g.start + len(g.ema)] for g in self.groups]
        ema = [g.ema for g in self.groups]
        ema_update_(ema, [g.master.detach() for g in self.groups], momentum, shards, impl=self.config.engine.kernels)
        for group in self.groups:
            self._all_gather(group.teacher, group)

    def _all_gather(self, flat: Tensor, group: FlatGroup) -> None:
        if self.stage and self.world_size > 1:
            _all_gather(flat, flat[group.start : group.start + len(group.master)].clone())

    def _gradients(self) -> list[list[Tensor]]:
        """This rank's averaged gradients per group."""
        if self.stage == 0:
            named = dict(self.engine.module.named_parameters())
            return [[p.grad for n in g.spec.names if (p := named[n]).grad is not None] for g in self.groups]
        return [list(self.optimizer.averaged_gradients.get(i) or ()) for i in range(len(self.groups))]

    def _adam(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if self.stage else self.optimizer

    def _replicated(self, spec: GroupSpec, named: dict[str, nn.Parameter], flat: Tensor) -> FlatGroup:
        params = [named[n] for n in spec.names]
        offsets = [int(p.storage_offset()) for p in params]
        places: list[tuple[Tensor, slice]] = [
            (p, slice(o, o + p.numel())) for p, o in zip(params, offsets, strict=True)
        ]
        teacher = flat.clone()
        return FlatGroup(spec, [tuple(p.shape) for p in params], offsets, flat, flat.clone(), teacher, 0, places)

    def _sharded(self, index: int, spec: GroupSpec, named: dict[str, nn.Parameter]) -> FlatGroup:
        params = [named[n] for n in spec.names]
        flat = self.optimizer.bit16_groups_flat[index]
        master = self.optimizer.param_groups[index]["params"][0]
        assert all(p.data.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in params)
        assert master.dtype == torch.float32
        assert len(master) * self.world_size == len(flat)
        return FlatGroup(
            spec,
            [tuple(p.shape) for p in params],
            [int(p.storage_offset() - flat.storage_offset()) for p in params],
            master,
            master.detach().clone(),
            flat.detach().clone(),
            self.rank * len(master),
            [(master, slice(None))],
        )

    def _attach_teacher(self) -> None:
        """Make the teacher's parameters views of the flat vectors."""
        named = dict(self.teacher.named_parameters())
        for group in self.groups:
            for name, shape, offset in zip(group.spec.names, group.shapes, group.offsets, strict=True):
                named[name].data = group.teacher[offset : offset + torch.Size(shape).numel()].view(shape)


def _flatten(module: nn.Module, names: tuple[str, ...]) -> Tensor:
    """Move parameters into one vector, of which they become views."""
    named = dict(module.named_parameters())
    flat = torch.cat([named[n].detach().reshape(-1) for n in names])
    offset = 0
    for name in names:
        parameter = named[name]
        parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return flat


def _initialize(student: nn.Module, optimizer: torch.optim.Optimizer, config: ExperimentConfig, stage: int) -> Any:
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)  # DeepSpeed's own
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled at first use, and not needed
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # per module, by us
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
    }
    if config.engine.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=settings)
    engine.train()
    return engine
