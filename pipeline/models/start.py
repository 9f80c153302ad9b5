"""How a run begins from other weights: `model.init_from` names a timm model, its directory, or a bundle."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import ExperimentConfig
from pipeline.config.model import is_bundle
from pipeline.elastic import build
from pipeline.elastic.axes import permute
from pipeline.elastic.backbone import Backbone
from pipeline.elastic.pretrained import load_pretrained
from pipeline.engine.core import Engine
from pipeline.engine.distributed import Ranks
from pipeline.engine.groups import FlatGroup
from pipeline.errors import UserError
from pipeline.method.losses import Centering
from pipeline.method.tri_branch import Branch
from pipeline.models.bundle import MOMENTS, Bundle
from pipeline.models.order import Order, restore_order

_LISTED = 5  # of what does not fit


@dataclass(frozen=True)
class Begun:
    """What a student has taken over from a bundle.

    Attributes:
        names: parameters.
        complete: all of them, as they are; the moments then go with them.
        block_importance: of the network's blocks, if the bundle knows it.
    """

    names: list[str]
    complete: bool
    block_importance: list[list[float]] | None = None


def load_start(backbone: Backbone, source: str) -> list[str]:
    """Load a backbone from `model.init_from`; the teacher's weights of a bundle.

    Returns:
        What of the backbone a bundle does not have.

    Raises:
        UserError: it cannot be loaded, or does not fit.
    """
    if not is_bundle(source):
        load_pretrained(backbone, source)
        _require_finite(backbone, source)
        return []
    wanted = {f"backbone.{name}": p.shape for name, p in backbone.named_parameters()}
    fit = Bundle(Path(source)).fit("teacher", wanted, backbone.config)
    backbone.load_state_dict({n.removeprefix("backbone."): w for n, w in fit.weights.items()}, strict=False)
    _require_finite(backbone, source)
    return fit.left


@torch.no_grad()
def frozen_start(
    config: ExperimentConfig, ranks: Ranks, order: Order | None, fresh: bool, dtype: torch.dtype
) -> Backbone:
    """The full network as the run began, on every rank, never to change. Collective; rank 0 reads it.

    Args:
        config: the experiment.
        ranks: this process and its peers.
        order: what its weights were put in, if the run begins now.
        fresh: the run begins; one that goes on has kept the order in its directory.
        dtype: of weights and images.

    Raises:
        UserError: `model.init_from` is not there any more, or the run does not know the order.
    """
    kernels = config.engine.kernels
    backbone = build(config.model, attention=kernels.attention, residual=kernels.residual)

    def load() -> None:
        assert config.model.init_from
        load_start(backbone, config.model.init_from)
        if order:
            permute(backbone, order.units)
        elif not fresh and config.model.init_order != "none":
            restore_order(backbone, Path(config.run.dir))

    ranks.agree(load)
    backbone.to(ranks.device).requires_grad_(False)
    for parameter in backbone.parameters():
        dist.broadcast(parameter, 0)
    if config.engine.compile:
        backbone.compile_blocks()
    return backbone.to(dtype)


def begin(student: Branch, source: str) -> Begun | None:
    """Load a student, before it is spread over the ranks, on one of them.

    Args:
        student: freshly built.
        source: `model.init_from`.

    Returns:
        What it took over from a bundle; None from timm's weights.

    Raises:
        UserError: it cannot be loaded, or does not fit.
    """
    if not is_bundle(source):
        load_pretrained(student.backbone, source)
        _require_finite(student, source)
        return None
    bundle = Bundle(Path(source))
    fit = bundle.fit("student", {name: p.shape for name, p in student.named_parameters()}, student.backbone.config)
    student.load_state_dict(fit.weights, strict=False)
    _require_finite(student, source)
    complete = fit.whole and bundle.has_moments
    more = ", moments" if complete else ""
    print(
        f"beginning from step {bundle.manifest['step']} of {bundle.manifest['run']}: "
        f"{len(fit.weights)} weights of student and teacher{more} and the centers that fit",
        file=sys.stderr,
    )
    for line in [*fit.left[:_LISTED], *([f"and {len(fit.left) - _LISTED} more"] if fit.left[_LISTED:] else [])]:
        print(f"note: begins fresh: {line}", file=sys.stderr)
    return Begun(list(fit.weights), complete, bundle.block_importance(student.backbone.config))


def _require_finite(module: torch.nn.Module, source: str) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            fix = "name weights of before it diverged, or copy them again"
            raise UserError(f"{name} is not finite", f"model.init_from={source}", fix)


@torch.no_grad()
def bring_the_rest(engine: Engine, centering: Centering, source: str, begun: Begun, ranks: Ranks) -> None:
    """Teacher, moments and centers of a bundle, into an engine whose student has begun from it. Collective.

    Rank 0 reads them and hands them over one by one.
    """
    there: dict[str, dict[str, Tensor]] = {}

    def read() -> int:
        bundle, model = Bundle(Path(source)), engine.branch.backbone.config
        shapes = {n: torch.Size(s) for g in engine.groups for n, s in zip(g.spec.names, g.spec.shapes, strict=True)}
        there.update(ema=bundle.fit("teacher", shapes, model).weights, centers=bundle.centers())
        if begun.complete:
            there.update(bundle.moments())
        return bundle.manifest["optimizer_steps"] if begun.complete else 0

    def hand_over(key: str, name: str, like: Tensor) -> Tensor:
        """The bundle's, from rank 0 to all; `like` itself if it has none that fits."""
        found = there.get(key, {}).get(name)
        tensor = (like if found is None or found.numel() != like.numel() else found).reshape(-1).to(ranks.device)
        dist.broadcast(tensor, 0)
        return tensor

    steps, names = ranks.agree(read), set(begun.names)
    vectors = ("ema", *(MOMENTS if begun.complete else ()))
    for index, group in enumerate(engine.groups):
        shard = {"master": group.master.detach().clone(), "ema": group.ema.clone(), **engine.moments(group)}
        for name, offset, size in zip(group.spec.names, group.spec.offsets, group.spec.sizes, strict=True):
            for key in vectors if name in names else ():
                _put(shard[key], group, offset, hand_over(key, name, torch.zeros(size)))
        engine.restore(index, shard, steps)
    engine.refresh()
    for kind, heads in centering.center.items():
        for h, center in enumerate(heads):
            center.copy_(hand_over("centers", f"{kind}.{h}", center))


def _put(shard: Tensor, group: FlatGroup, offset: int, whole: Tensor) -> None:
    """Into a rank's shard of a group, what it has of a parameter that begins at `offset`."""
    for piece in group.pieces:
        low, high = max(piece.start, offset), min(piece.start + piece.length, offset + len(whole))
        if low < high:
            here = piece.local + low - piece.start
            shard[here : here + high - low].copy_(whole[low - offset : high - offset])
