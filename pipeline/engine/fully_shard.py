"""FSDP2: student and teacher in shards, gathered block by block while they are used.

A rank owns a part of every parameter, in fp32: the student's parts are the masters, the teacher's are the moving
average, and gathering rounds them to the working precision, so there is no third copy of either. All parts of a branch
lie in one flat vector, which is what the one pass updates. Every rank calls every block, since gathering is collective.
"""

import copy
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard as ShardOf

from kernels.optimizer import Shard
from pipeline.config import EngineConfig
from pipeline.engine.groups import FlatGroup, GroupSpec, Piece
from pipeline.engine.layouts import Layout, Replica, reduction_dtype, working_dtype
from pipeline.engine.optimizer import FlatAdamW
from pipeline.errors import UserError
from pipeline.method.tri_branch import Branch

# it warns of operations in place on what a branch returns, which would hide it from the backward pass; there are none
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class FullyShard(Layout):
    """The student and its teacher under `fully_shard`.

    With `reshard_after_forward` a weight is whole only while its block computes, and gradients are reduced after each
    backward pass, as at ZeRO-3. Without, the student stays whole from its first forward to its last backward pass, and
    gradients are added up on the rank and reduced once: half the traffic or less, for a copy of the weights and of the
    gradients on every rank. The teacher's single pass leaves nothing gathered.
    """

    def __init__(self, student: Branch, specs: list[GroupSpec], config: EngineConfig, device: torch.device):
        _take_from_rank_0(student, device)
        teacher = copy.deepcopy(student).eval().requires_grad_(False)  # a copy after `fully_shard` is refused
        mesh = _mesh(config, device)
        parts = _parts(specs, mesh)
        self._resharded = config.reshards(sum(p.numel() for p in student.parameters()))
        self._units = [
            *_sharded(student, mesh, config, self._resharded),
            *_sharded(teacher, mesh, config, True),  # the root, too, or the teacher would go stale unnoticed
        ]
        master, ema = (_lay_out(branch, parts, device) for branch in (student, teacher))
        self.student = self.branch = student
        self.teacher = teacher
        self._root = cast(FSDPModule, student)
        self._every_pass = self._resharded and self._takes_unused()
        self._parts = parts
        named = dict(student.named_parameters())
        self._parameters = [named[part.name] for part in parts]
        self._zero = master.new_zeros(1)
        self._gradients: list[Tensor] = []
        self.optimizer = FlatAdamW([master])
        self.shard = Shard.of(master, ema)
        self.groups = _groups(specs, parts, self.shard)
        if mesh.ndim > 1:
            self.replica = Replica(mesh.get_local_rank("replicate"), mesh.size(0))

    def _takes_unused(self) -> bool:
        """Let FSDP2 reduce what some rank's sub-network leaves out, if this version of torch can."""
        if not hasattr(self._root, "set_reduce_scatter_unused_params"):
            if dist.get_rank() == 0:
                note = "note: before torch 2.13 FSDP2 reduces after both passes alone: every rank holds all gradients"
                print(note, file=sys.stderr)
            return False
        self._root.set_reduce_scatter_unused_params(True)
        return True

    def backward(self, loss: Tensor, last: bool) -> None:
        self._root.set_requires_gradient_sync(last or self._every_pass)
        self._root.set_requires_all_reduce(last)  # replicas of a shard add up once, what both passes left there
        self._root.set_reshard_after_backward(last or self._resharded)
        loss.backward()

    @torch.no_grad()  # with it, what a shard holds is at hand without a call of autograd's
    def finish_backward(self) -> None:
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            found = 0
            if parameter.grad is not None:
                own = cast(DTensor, parameter.grad).to_local()
                found = own.numel()
                self._gradients.append(own.reshape(-1))
            if found < part.length:
                self._gradients.append(self._zero.expand(part.length - found))

    def gradients(self) -> Sequence[Tensor]:
        return self._gradients

    def forget_gradients(self) -> None:
        self._gradients = []
        for parameter in self._parameters:
            parameter.grad = None

    def publish_student(self) -> None:
        """The masters are what is gathered; forget what was."""
        self._reshard()

    def publish_teacher(self) -> None:
        """The average is what is gathered."""
        self._reshard()

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    @contextmanager
    def whole_teacher(self) -> Iterator[Branch]:
        with gathered(cast(Branch, self.teacher)) as branch:
            yield branch


@contextmanager
def gathered(branch: Branch) -> Iterator[Branch]:
    """A branch with all of its weights on every rank, to be read only; not to be called. Collective."""
    units = [module for module in branch.modules() if isinstance(module, FSDPModule)]
    try:
        for unit in units:
            unit.unshard()
        yield branch
    finally:
        for unit in units:
            unit.reshard()


@dataclass(frozen=True)
class Part:
    """A rank's part of a parameter: entries `[start, stop)` along a dimension.

    Attributes:
        name, shape: of the parameter.
        dim: along which it is cut into as many parts as there are ranks to a shard.
        share: entries of a part, of which the last ones may have fewer, and then padding.
        start: of this rank's.
        begin: of this part in the rank's flat vector.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    share: int
    start: int
    begin: int = 0

    @property
    def padded(self) -> tuple[int, ...]:
        """Shape with padding."""
        return (*self.shape[: self.dim], self.share, *self.shape[self.dim + 1 :])

    @cached_property
    def length(self) -> int:
        """Elements with padding."""
        return prod(self.padded)

    def pieces(self, offset: int, local: int) -> Iterator[Piece]:
        """Where its elements, the first at `local`, belong in a vector that holds the parameter at `offset`."""
        inner, rows = prod(self.shape[self.dim + 1 :]), self.shape[self.dim]
        length = (min(self.start + self.share, rows) - self.start) * inner
        if length > 0:
            for block in range(prod(self.shape[: self.dim])):
                here, there = block * self.share * inner, (block * rows + self.start) * inner
                yield Piece(local + here, offset + there, length)


def cut_dim(shape: Sequence[int], ranks: int) -> int:
    """The dimension along which a parameter is cut: the first, as FSDP2 has it, unless most ranks would have padding.

    A position embedding has one row; along the others FSDP2 takes equal parts alone.
    """
    if shape[0] < ranks:
        return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)
    return 0


def _take_from_rank_0(branch: Branch, device: torch.device) -> None:
    with torch.no_grad():
        for tensor in branch.parameters():
            moved = tensor.to(device)
            dist.broadcast(moved, 0)
            tensor.copy_(moved)


def _mesh(config: EngineConfig, device: torch.device) -> DeviceMesh:
    """The ranks, or (replicas, ranks of a shard)."""
    world = dist.get_world_size()
    ranks = _ranks_per_node() if config.shard_size == "node" else {"all": world, "one": 1}[str(config.shard_size)]
    if ranks == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // ranks, ranks), mesh_dim_names=("replicate", "shard"))


def _ranks_per_node() -> int:
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, platform.node())
    count = nodes.count(nodes[0])
    together = [nodes[i : i + count] for i in range(0, len(nodes), count)]
    if any({*part} != {part[0]} or nodes.count(part[0]) != count for part in together):
        raise UserError(
            "the nodes have different numbers of ranks, or ranks that do not follow one another",
            "engine.shard_size=node",
            "start as many ranks on every node, or set engine.shard_size=all",
        )
    return count


def _parts(specs: Sequence[GroupSpec], mesh: DeviceMesh) -> list[Part]:
    """Of every parameter, in the order of the flat vector."""
    ranks, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank("shard")
    parts: list[Part] = []
    for spec in specs:
        for name, shape in zip(spec.names, spec.shapes, strict=True):
            dim = cut_dim(shape, ranks)
            share = -(-shape[dim] // ranks)
            begin = parts[-1].begin + parts[-1].length if parts else 0
            parts.append(Part(name, shape, dim, share, min(rank * share, shape[dim]), begin))
    return parts


def _sharded(branch: Branch, mesh: DeviceMesh, config: EngineConfig, resharded: bool) -> list[FSDPModule]:
    """Put every block, every head and the rest in shards; a device never holds more than one of them whole."""
    policy = MixedPrecisionPolicy(working_dtype(config), reduction_dtype(config), cast_forward_inputs=False)
    ranks = mesh.size(mesh.ndim - 1)
    for module in [*branch.backbone.elastic_blocks(), *branch.heads.heads, branch]:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=resharded,
            shard_placement_fn=lambda parameter: ShardOf(cut_dim(parameter.shape, ranks)),
        )
    return [module for module in branch.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def _lay_out(branch: Branch, parts: Sequence[Part], device: torch.device) -> Tensor:
    """Move a branch's shards into one flat vector, which FSDP2 gathers from then on.

    It does so with parameters that were loaded in place of its own, if these have room for the padding; so what is
    loaded is as long as the longest part.
    """
    flat = torch.zeros(sum(part.length for part in parts), device=device)
    named, loaded = dict(branch.named_parameters()), {}
    for part in parts:
        before = cast(DTensor, named[part.name])
        own = before.to_local().reshape(-1)
        place = flat[part.begin : part.begin + part.length]
        place[: len(own)].copy_(own)
        loaded[part.name] = DTensor.from_local(
            place.view(part.padded),
            before.device_mesh,
            before.placements,
            run_check=False,
            shape=before.shape,
            stride=before.stride(),
        )
    branch.load_state_dict(loaded, strict=False, assign=True)
    return flat


def _groups(specs: Sequence[GroupSpec], parts: Sequence[Part], shard: Shard) -> list[FlatGroup]:
    groups: list[FlatGroup] = []
    counts = [0, *accumulate(len(spec.names) for spec in specs)]
    for spec, first, last in zip(specs, counts, counts[1:], strict=False):
        own = parts[first:last]
        begin = own[0].begin
        pieces = [
            p for part, offset in zip(own, spec.offsets, strict=True) for p in part.pieces(offset, part.begin - begin)
        ]
        groups.append(FlatGroup(spec, shard, slice(begin, own[-1].begin + own[-1].length), pieces))
    return groups
