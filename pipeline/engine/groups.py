"""Parameter groups, and where they lie in the flat fp32 vectors of a rank.

All groups, one after the other, are one vector, of which a rank holds a shard; so one pass updates them all, and one
collective gathers them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.optimizer import Segment, Shard
from pipeline.config import OptimConfig
from pipeline.method.tri_branch import Branch

MODULES = ("backbone", "heads")  # gradients are clipped module by module
PARTS = (*MODULES, "prototypes")  # and weights freeze part by part


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

    @property
    def part(self) -> int:
        """Position in `PARTS`."""
        return PARTS.index("prototypes" if self.prototypes else self.module)


def parameter_groups(student: Branch, optim: OptimConfig) -> list[GroupSpec]:
    """Group the student's parameters by learning-rate multiplier, weight decay and module.

    The multiplier is `layer_decay ** (layers - layer)`, times `patch_embed_lr_scale` for the patch embedding.

    Groups come by the first layer that they reach, whose gradients are the last to come, and of those that begin in one
    the smallest first: norms and biases of all layers, where one rate holds for all, lie in front of the weights and
    hold up no bucket of these.
    """
    backbone = student.backbone
    named = dict(student.named_parameters())
    groups: dict[tuple[str, float, bool, bool], list[str]] = {}
    reaches: dict[tuple[str, float, bool, bool], int] = {}
    for name, parameter in named.items():
        module, _, inner = name.partition(".")
        layer = backbone.layer_id(inner) if module == "backbone" else backbone.num_layers
        if module == "backbone":
            scale = optim.layer_decay ** (backbone.num_layers - layer)
            if backbone.is_patch_embed(inner):
                scale *= optim.patch_embed_lr_scale
            decayed, prototypes = not backbone.no_weight_decay(inner), False
        else:
            scale, decayed, prototypes = 1.0, parameter.ndim > 1, "prototypes" in inner
        key = (module, scale, decayed, prototypes)
        groups.setdefault(key, []).append(name)
        reaches[key] = min(layer, reaches.get(key, layer))
    specs = {
        key: GroupSpec(*key, names=tuple(names), shapes=tuple(tuple(named[n].shape) for n in names))
        for key, names in groups.items()
    }
    order = sorted(specs, key=lambda key: (MODULES.index(key[0]), reaches[key], specs[key].numel))
    return [specs[key] for key in order]


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
    """One parameter group on one rank: its place in the rank's shard of everything.

    Attributes:
        spec: what the group is.
        shard: the rank's vectors, of all groups one after the other.
        place: the group's elements of them.
        pieces: where these belong in the group's flat vector, rising; padding is in none of them.
    """

    spec: GroupSpec
    shard: Shard
    place: slice
    pieces: Sequence[Piece]

    @property
    def master(self) -> Tensor:
        """fp32 weights."""
        return self.shard.master[self.place]

    @property
    def ema(self) -> Tensor:
        """The teacher's, fp32."""
        return self.shard.ema[self.place]

    @property
    def moments(self) -> dict[str, Tensor]:
        """AdamW's, by the names that torch gives them; zeros before the first step."""
        return {"exp_avg": self.shard.first[self.place], "exp_avg_sq": self.shard.second[self.place]}

    @property
    def segment(self) -> Segment:
        spec = self.spec
        return Segment(self.place.start, self.place.stop - self.place.start, spec.part, spec.lr_scale, spec.decayed)


def offsets(specs: Sequence[GroupSpec]) -> list[int]:
    """Where each group begins in the flat vector of everything, and where that ends."""
    return [0, *accumulate(spec.numel for spec in specs)]


@dataclass(frozen=True)
class Buckets:
    """Intervals of the flat vector of everything, which travel one by one. A rank's shard is its part of each.

    Attributes:
        bounds: where each begins, and where the last one ends; they are multiples of `ranks`.
        ranks: that own an equal part of each.
        rank: this one.
    """

    bounds: tuple[int, ...]
    ranks: int = 1
    rank: int = 0

    @classmethod
    def of(cls, length: int, limit: int, ranks: int = 1, rank: int = 0) -> "Buckets":
        """Cut a vector into buckets, of which the first, the last that backward passes complete, may be smaller.

        Args:
            length: of the vector, a multiple of the number of ranks.
            limit: elements of a bucket at most, but one per rank at least.
            ranks: that own them.
            rank: this one.
        """
        size = max(limit // ranks, 1) * ranks
        return cls((0, *range(length % size or size, length, size), length), ranks, rank)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def share(self) -> int:
        """Elements that this rank owns."""
        return self.bounds[-1] // self.ranks

    def whole(self, bucket: int) -> slice:
        """A bucket's place in the flat vector."""
        return slice(self.bounds[bucket], self.bounds[bucket + 1])

    def local(self, bucket: int) -> slice:
        """The place of this rank's part of it in the shard."""
        return slice(self.bounds[bucket] // self.ranks, self.bounds[bucket + 1] // self.ranks)

    def own(self, bucket: int) -> slice:
        """The place of this rank's part of it in the flat vector."""
        whole, local = self.whole(bucket), self.local(bucket)
        start = whole.start + self.rank * (local.stop - local.start)
        return slice(start, start + local.stop - local.start)


def in_buckets(specs: Sequence[GroupSpec], shard: Shard, buckets: Buckets) -> list[FlatGroup]:
    """The groups on a rank whose shard is its parts of the buckets."""
    groups, local = [], 0
    for spec, begin in zip(specs, offsets(specs), strict=False):
        pieces, length = [], 0
        for own in map(buckets.own, range(len(buckets))):
            low, high = max(own.start, begin), min(own.stop, begin + spec.numel)
            if low < high:
                pieces.append(Piece(length, low - begin, high - low))
                length += high - low
        groups.append(FlatGroup(spec, shard, slice(local, local + length), pieces))
        local += length
    return groups
