"""In which order a pretrained network's channels, heads, hidden units and blocks are kept by its sub-networks.

A network that was never elastic has its channels in no order, so that its leading half is no better than another. Here
they are sorted by importance, before the first step: by the norm of their weights (`magnitude`), or by what the loss
would change to first order without them (`taylor`): the derivative by a factor on what a unit writes, squared and
averaged over the user's images, under self-distillation between crops without labels. For `taylor`, blocks are left out
one after the other, always the one without which the features change least. (The idea is that of SnapViT, arXiv
2510.17700, and EA-ViT, 2507.19360.)
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import ExperimentConfig
from pipeline.data.loader import Loader
from pipeline.data.reader import Dataset
from pipeline.elastic.axes import axes, magnitudes, permute, written_by_blocks
from pipeline.elastic.backbone import Backbone, ElasticBlock
from pipeline.errors import UserError

IMAGES = 2048
"""On which units are measured."""
BLOCK_IMAGES = 256
"""On which blocks are measured: a forward pass for each that could go, over and over."""
TEMPERATURES = (0.4, 1.0)
"""Of teacher and student over standardised features; the ratio of DINO's 0.04 and 0.1."""
ORDER = "init_order.json"
_CHUNK = 8  # images of a backward pass: the fewer, the less do gradients of different images cancel
_BLOCK_CHUNK = 32
_ALWAYS = 2.0  # importance of a block that no depth leaves out; a cosine distance is no larger


@dataclass(frozen=True)
class Order:
    """What was measured, a value that JSON holds.

    Attributes:
        method: "magnitude" or "taylor".
        images: that were looked at.
        units: by axis, which unit comes first, second, ...
        blocks: by stage, the importance of each block.
    """

    method: str
    images: int
    units: dict[str, list[int]]
    blocks: list[list[float]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def put_in_order(backbone: Backbone, config: ExperimentConfig, device: torch.device, dataset: Dataset | None) -> Order:
    """Measure by `model.init_order` and move the units; the full network computes what it did before.

    Args:
        backbone: with its pretrained weights, on the CPU.
        config: the experiment; its training images are looked at.
        device: where they are.
        dataset: `data.train`, if it is open already.

    Returns:
        The order, in which the units are now; the blocks stay where they are.

    Raises:
        UserError: the data cannot be read.
    """
    if config.model.init_order == "magnitude":
        found = _by_magnitude(backbone)
    else:
        found = _by_taylor(backbone, config, device, dataset)
    permute(backbone, found.units)
    looked = f" on {found.images} images" if found.images else ""
    print(f"channels, heads and hidden units are in the order of their {found.method}{looked}", file=sys.stderr)
    return found


def restore_order(backbone: Backbone, run_dir: Path | None) -> None:
    """Put freshly loaded weights in the order in which a run began with them.

    Raises:
        UserError: the run directory does not hold it.
    """
    path = (run_dir or Path()) / ORDER
    try:
        permute(backbone, json.loads(path.read_text(encoding="utf-8"))["units"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"not the order in which the run put its first weights: {error}",
            str(path),
            "restore it (a fork has it where the first of its runs is), or leave out --untrained",
        ) from error


def _by_magnitude(backbone: Backbone) -> Order:
    norms, stages = written_by_blocks(backbone), _stages(backbone)
    blocks = [_scaled([norms[i] for i in stage]) for stage in stages]
    return _order("magnitude", 0, magnitudes(backbone), _with_fixed(backbone, blocks))


def _by_taylor(backbone: Backbone, config: ExperimentConfig, device: torch.device, dataset: Dataset | None) -> Order:
    backbone.to(device)
    loader = Loader(config.data, device=device, dataset=dataset, channels=config.model.in_chans)
    images = min(IMAGES, len(loader.dataset))
    try:
        sums = {axis.name: torch.zeros(axis.units, device=device) for axis in axes(backbone)}
        seen, globals_ = 0, []
        while seen < images:
            batch, count = next(loader), config.data.batch_size
            glob, local = (crops.float().unflatten(0, (count, -1)) for crops in batch)
            if seen < BLOCK_IMAGES:
                globals_.append(glob[:, 0].clone())
            for start in range(0, count, _CHUNK):
                part = slice(start, start + _CHUNK)
                for name, effect in _effects(backbone, glob[part], local[part]).items():
                    sums[name] += effect.square()
            seen += count
        blocks = _leave_out(backbone, torch.cat(globals_)[:BLOCK_IMAGES])
    finally:
        loader.close()
        backbone.to("cpu")
    return _order("taylor", seen, {name: s.cpu() for name, s in sums.items()}, blocks)


def _order(method: str, images: int, scores: dict[str, Tensor], blocks: list[list[float]]) -> Order:
    units = {name: score.argsort(descending=True, stable=True).tolist() for name, score in scores.items()}
    return Order(method, images, units, [[float(f"{x:.8g}") for x in stage] for stage in blocks])


def _effects(backbone: Backbone, glob: Tensor, local: Tensor) -> dict[str, Tensor]:
    """The derivative of the loss of a few images by a factor on each unit, by axis; crops `[B, G or L, C, H, W]`."""
    parameters, every = dict(backbone.named_parameters()), axes(backbone)
    names = list(dict.fromkeys(place.name for axis in every for place in axis.gate))
    with torch.enable_grad():
        crops = [x.flatten(0, 1) for x in (glob, local) if x.shape[1]]
        students = [f.cls.unflatten(0, (len(glob), -1)) for f in backbone.forward_crops(crops, backbone.grid.largest)]
        loss = self_distillation(students[0], torch.cat(students, 1))
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
    products = {n: (g * parameters[n]).detach() for n, g in zip(names, gradients, strict=True)}
    return {a.name: torch.stack([p.per_unit(products[p.name]) for p in a.gate]).sum(0) for a in every}


def self_distillation(teacher: Tensor, students: Tensor) -> Tensor:
    """Cross-entropy between crops of the same image, features as logits.

    Args:
        teacher: `[B, G, D]` features of the global crops; no gradient passes through them as targets.
        students: `[B, G + L, D]` features of all crops, the global ones first.

    Returns:
        The mean over images and pairs of different crops.
    """
    sharp, soft = TEMPERATURES
    dim = teacher.shape[-1:]
    targets = (F.layer_norm(teacher.detach(), dim) / sharp).softmax(-1)
    logs = (F.layer_norm(students, dim) / soft).log_softmax(-1)
    pairs = -torch.einsum("bgd,bsd->bgs", targets, logs)
    others = 1 - torch.eye(*pairs.shape[1:], device=pairs.device)
    return (pairs * others).sum() / (others.sum() * len(pairs))


@torch.no_grad()
def _leave_out(backbone: Backbone, images: Tensor) -> list[list[float]]:
    """By stage, how far features turn (1 - cosine, the mean over images) as blocks go, the least important first."""
    every, config = backbone.elastic_blocks(), backbone.config
    importance = []

    def cls() -> Tensor:
        return torch.cat([F.normalize(backbone(part).cls, dim=-1) for part in images.split(_BLOCK_CHUNK)])

    whole = cls()
    for stage, choices in zip(_stages(backbone), config.depth_ranges, strict=True):
        scores, gone = [_ALWAYS] * len(stage), list[int]()
        movable = [i for i in range(len(stage)) if i or config.family != "resnet"]
        while len(stage) - len(gone) > choices[0]:
            turned = {}
            for i in movable:
                if i not in gone:
                    with _without([every[stage[k]] for k in (*gone, i)]):
                        turned[i] = 1 - (whole * cls()).sum(-1).mean().item()
            least = min(turned, key=lambda i: turned[i])
            # never less than that of what went before, so that depths nest
            scores[least] = max(turned[least], scores[gone[-1]] + 1e-6 if gone else 0.0)
            gone.append(least)
        importance.append(scores)
    return importance


@contextmanager
def _without(blocks: list[ElasticBlock]) -> Iterator[None]:
    """The network as it is without some of its blocks."""
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "active": False}), with_kwargs=True)
        for block in blocks
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _stages(backbone: Backbone) -> list[list[int]]:
    """Positions of the blocks of each stage among all of them."""
    found, done = [], 0
    for depth in backbone.grid.largest.depths:
        found.append(list(range(done, done + depth)))
        done += depth
    return found


def _scaled(norms: list[float]) -> list[float]:
    return [norm / max(norms) for norm in norms]


def _with_fixed(backbone: Backbone, blocks: list[list[float]]) -> list[list[float]]:
    """ResNet's first block of a stage changes the number of channels, so that every depth has it."""
    if backbone.config.family != "resnet":
        return blocks
    return [[_ALWAYS, *rest] for _, *rest in blocks]
