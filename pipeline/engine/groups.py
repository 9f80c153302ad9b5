"""Parameter groups, and the flat fp32 vectors that each of them is on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import OptimConfig
from pipeline.method.tri_branch import Branch

MODULES = ("backbone", "heads")  # gradients are clipped module by module


@dataclass(frozen=True)
class GroupSpec:
    """Parameters that share their multipliers.

    Attributes:
        module: entry of `MODULES`.
        lr_scale: multiplier of the learning rate.
        decayed: whether weight decay applies.
        prototypes: whether they freeze in the first epochs.
        names: parameter names, in the order of the flat vector.
        shapes: of the parameters.
    """

    module: str
    lr_scale: float
    decayed: bool
    prototypes: bool
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Elements of each parameter."""
        return [torch.Size(shape).numel() for shape in self.shapes]

    @property
    def offsets(self) -> list[int]:
        """Where each parameter begins in the flat vector."""
        return [0, *accumulate(self.sizes)][:-1]

    @property
    def numel(self) -> int:
        return sum(self.sizes)


def parameter_groups(student: Branch, optim: OptimConfig) -> list[GroupSpec]:
    """Group the student's parameters by learning-rate multiplier, weight decay and module.

    The multiplier is `layer_decay ** (layers - layer)`, times `patch_embed_lr_scale` for the patch embedding.
    """
    backbone = student.backbone
    named = dict(student.named_parameters())
    groups: dict[tuple[str, float, bool, bool], list[str]] = {}
    for name, parameter in named.items():
        module, _, inner = name.partition(".")
        if module == "backbone":
            scale = optim.layer_decay ** (backbone.num_layers - backbone.layer_id(inner))
            if backbone.is_patch_embed(inner):
                scale *= optim.patch_embed_lr_scale
            decayed, prototypes = not backbone.no_weight_decay(inner), False
        else:
            scale, decayed, prototypes = 1.0, parameter.ndim > 1, "prototypes" in inner
        groups.setdefault((module, scale, decayed, prototypes), []).append(name)
    return [
        GroupSpec(*key, names=tuple(names), shapes=tuple(tuple(named[n].shape) for n in names))
        for key, names in groups.items()
    ]


class Piece(NamedTuple):
    """Elements [local, local + length) of a rank's shard are elements [start, start + length) of the flat vector."""

    local: int
    start: int
    length: int

    @property
    def here(self) -> slice:
        return slice(self.local, self.local + self.length)

    @property
    def there(self) -> slice:
        return slice(self.start, self.start + self.length)


@dataclass
class FlatGroup:
    """One parameter group on one rank: its shard of the group's flat fp32 vectors.

    Attributes:
        spec: what the group is.
        master: the shard of the weights, fp32; with the padding that DeepSpeed adds.
        ema: the shard of the teacher's weights, laid out like `master`.
        teacher: the same in the working precision, from where the teacher is rebuilt on every rank.
        pieces: where the shard's elements belong in the flat vector, rising; padding is in none of them.
        params: the optimizer's tensors that make up `master`, with their places in it.
    """

    spec: GroupSpec
    master: Tensor
    ema: Tensor
    teacher: Tensor
    pieces: Sequence[Piece]
    params: list[tuple[Tensor, slice]] = field(default_factory=list)
