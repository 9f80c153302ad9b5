"""Which channels, heads and hidden units of a network may change places, and what each is worth.

An `Axis` is a set of like units that sub-networks cut: they keep a leading part of them. Its units stand at the same
place in several parameters; moved in all of them alike, the full network computes what it did before (its features in
another order), while each sub-network is made of other units.

What cannot be moved: channels within a head (rotary positions turn pairs of them, and a head is kept whole), heads and
hidden units from block to block, ResNet's residual channels (no sub-network cuts them), and its mid channels other than
by whole groups of the GroupNorm behind them.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pipeline.config.model import GROUPS
from pipeline.elastic.backbone import Backbone


class Place(NamedTuple):
    """Where the units of an axis stand in a parameter.

    Attributes:
        name: of the parameter.
        dim: along which they lie.
        unit: entries of a unit.
        parts: equal parts of the dimension that hold one entry of each unit after the other.
    """

    name: str
    dim: int = 0
    unit: int = 1
    parts: int = 1

    def entries(self, order: Tensor) -> Tensor:
        """Entries of the dimension, when unit i becomes what unit `order[i]` was."""
        entries = (order[:, None] * self.unit + torch.arange(self.unit)).flatten()
        return (torch.arange(self.parts)[:, None] * len(entries) + entries).flatten()

    def per_unit(self, values: Tensor) -> Tensor:
        """Sums of what belongs to each unit, of a tensor in the shape of the parameter."""
        lines = values.movedim(self.dim, 0).flatten(1) if values.ndim > 1 else values[:, None]
        return lines.sum(1).unflatten(0, (self.parts, -1, self.unit)).sum((0, 2))


class Axis(NamedTuple):
    """Units that may change places among each other.

    Attributes:
        name: a parameter or module that they are known by.
        units: how many.
        places: all parameters that hold them.
        gate: those of `places` that write what the units hold: to scale a unit is to scale its entries there.
    """

    name: str
    units: int
    places: tuple[Place, ...]
    gate: tuple[Place, ...]


def axes(backbone: Backbone) -> list[Axis]:
    """Every axis of a backbone whose units sub-networks cut."""
    shapes = {name: p.shape for name, p in backbone.named_parameters()}
    of_family = {"vit": _of_tokens, "eva": _of_tokens, "swin": _of_swin, "resnet": _of_resnet}
    return of_family[backbone.config.family](backbone, shapes)


@torch.no_grad()
def permute(backbone: Backbone, orders: Mapping[str, Iterable[int]]) -> None:
    """Move the units of each axis, in place: unit i becomes what unit `orders[name][i]` was.

    Raises:
        ValueError: an order is none of the axis.
    """
    parameters = dict(backbone.named_parameters())
    for axis in axes(backbone):
        order = torch.tensor(list(orders[axis.name]))
        if order.sort().values.tolist() != list(range(axis.units)):
            raise ValueError(f"{axis.name}: expected an order of {axis.units} units")
        for place in axis.places:
            parameter = parameters[place.name]
            parameter.copy_(parameter.index_select(place.dim, place.entries(order).to(parameter.device)))


@torch.no_grad()
def magnitudes(backbone: Backbone) -> dict[str, Tensor]:
    """Per axis, each unit's share of the squared norm of a parameter, its mean over the parameters that hold it."""
    parameters = dict(backbone.named_parameters())
    found = {}
    for axis in axes(backbone):
        squares = [place.per_unit(parameters[place.name].square()) for place in axis.places]
        found[axis.name] = torch.stack([s / s.sum().clamp(min=1e-30) for s in squares]).mean(0)
    return found


@torch.no_grad()
def written_by_blocks(backbone: Backbone) -> list[float]:
    """Squared norm of the weights with which each block writes to what it passes on, of all blocks in order."""
    found = []
    for block in backbone.elastic_blocks():
        p = dict(block.named_parameters())
        if "bn3.weight" in p:
            found.append(p["bn3.weight"].square().sum().item())
            continue
        branches = (("attn.proj.weight", "ls1.gamma", "gamma_1"), ("mlp.fc2.weight", "ls2.gamma", "gamma_2"))
        total = 0.0
        for weight, *scales in branches:
            scale = next((p[name] for name in scales if name in p), torch.ones(()))
            total += (scale[..., None] * p[weight]).square().sum().item()
        found.append(total)
    return found


def _present(shapes: Mapping[str, torch.Size], places: Iterable[Place]) -> tuple[Place, ...]:
    return tuple(place for place in places if place.name in shapes)


def _of_block(
    prefix: str, shapes: Mapping[str, torch.Size], head_dim: int
) -> tuple[list[Axis], list[Place], list[Place]]:
    """Axes within a transformer block, and the places of the channels between blocks, as (axes, reads, writes)."""
    attention, mlp = f"{prefix}attn.", f"{prefix}mlp."
    first = [f"{mlp}{name}" for name in ("fc1", "fc1_g", "fc1_x") if f"{mlp}{name}.weight" in shapes]
    out = Place(f"{attention}proj.weight", 1, head_dim)
    heads = Axis(
        f"{attention}heads",
        shapes[out.name][1] // head_dim,
        _present(
            shapes,
            [
                Place(f"{attention}qkv.weight", 0, head_dim, 3),
                Place(f"{attention}qkv.bias", 0, head_dim, 3),
                Place(f"{attention}relative_position_bias_table", 1),
                out,
            ],
        ),
        (out,),
    )
    last = Place(f"{mlp}fc2.weight", 1)
    ones = [Place(f"{name}.{kind}") for name in first for kind in ("weight", "bias")]
    hidden = Axis(f"{mlp}hidden", shapes[last.name][1], _present(shapes, [*ones, last]), (last,))
    norms = [f"{prefix}{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")]
    scales = [f"{prefix}{name}" for name in ("ls1.gamma", "ls2.gamma", "gamma_1", "gamma_2")]
    reads = [Place(name) for name in [*norms, *scales]]
    reads += [Place(f"{name}.weight", 1) for name in (f"{attention}qkv", *first)]
    writes = [Place(f"{layer}.{kind}") for layer in (f"{attention}proj", f"{mlp}fc2") for kind in ("weight", "bias")]
    return [heads, hidden], list(_present(shapes, reads)), list(_present(shapes, writes))


def _of_tokens(backbone: Backbone, shapes: Mapping[str, torch.Size]) -> list[Axis]:
    found: list[Axis] = []
    tokens = [Place(name, 2) for name in ("cls_token", "reg_token", "pos_embed")]
    writes = [Place("patch_embed.proj.weight"), Place("patch_embed.proj.bias"), *tokens]
    reads = [Place("mask_token", 1), Place("norm.weight"), Place("norm.bias")]
    for i in range(len(backbone.elastic_blocks())):
        within, block_reads, block_writes = _of_block(f"blocks.{i}.", shapes, backbone.config.head_dim)
        found, reads, writes = [*found, *within], [*reads, *block_reads], [*writes, *block_writes]
    gate = _present(shapes, writes)
    width = shapes["norm.weight"][0]
    return [Axis("channels", width, (*_present(shapes, reads), *gate), gate), *found]


def _of_swin(backbone: Backbone, shapes: Mapping[str, torch.Size]) -> list[Axis]:
    """The channels of each stage are an axis of their own, since patch merging makes new ones."""
    found: list[Axis] = []
    stages = list(cast(nn.Sequential, backbone.layers))
    for s, stage in enumerate(stages):
        if s == 0:
            writes = [Place("patch_embed.norm.weight"), Place("patch_embed.norm.bias")]
            reads = [Place("patch_embed.proj.weight"), Place("patch_embed.proj.bias"), Place("mask_token", 1)]
        else:
            writes, reads = [Place(f"layers.{s}.downsample.reduction.weight")], []
        for i in range(len(stage.blocks)):  # type: ignore[arg-type]
            within, block_reads, block_writes = _of_block(f"layers.{s}.blocks.{i}.", shapes, backbone.config.head_dim)
            found, reads, writes = [*found, *within], [*reads, *block_reads], [*writes, *block_writes]
        if s + 1 < len(stages):
            merging = f"layers.{s + 1}.downsample."
            reads += [Place(f"{merging}norm.{kind}", 0, 1, 4) for kind in ("weight", "bias")]
            reads.append(Place(f"{merging}reduction.weight", 1, 1, 4))
        else:
            reads += [Place("norm.weight"), Place("norm.bias")]
        gate = _present(shapes, writes)
        width = shapes[f"layers.{s}.blocks.0.norm1.weight"][0]
        found.append(Axis(f"layers.{s}.channels", width, (*_present(shapes, reads), *gate), gate))
    return found


def _of_resnet(backbone: Backbone, shapes: Mapping[str, torch.Size]) -> list[Axis]:
    """Mid channels behind the first and the second convolution of a block, by whole groups of the norm behind it."""
    found = []
    names = {block: name for name, block in backbone.named_modules()}
    for block in backbone.elastic_blocks():
        prefix = f"{names[block]}."
        for before, norm, behind in (("conv1", "bn1", "conv2"), ("conv2", "bn2", "conv3")):
            unit = shapes[f"{prefix}{norm}.weight"][0] // GROUPS
            gate = tuple(Place(f"{prefix}{norm}.{kind}", 0, unit) for kind in ("weight", "bias"))
            ends = (Place(f"{prefix}{before}.weight", 0, unit), Place(f"{prefix}{behind}.weight", 1, unit))
            found.append(Axis(f"{prefix}{norm}.groups", GROUPS, (*ends, *gate), gate))
    return found
