"""What can be evaluated: sub-networks of a run, trained or not, a timm directory, raw pixels."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from pipeline.data.intake import Intake
from pipeline.elastic import Grid, Subnet
from pipeline.errors import UserError
from pipeline.evaluate.features import pooled
from pipeline.models.loading import RunModels, choose, load_directory, run_config
from pipeline.models.timm_format import VALUE_RANGE, preprocessing

PIXELS = "pixels"
UNTRAINED = "untrained "
PIXEL_SIDE = 32


@dataclass(frozen=True)
class Candidate:
    """A model that is built when its turn comes.

    Attributes:
        name: of the sub-network or directory.
        load: builds the module.
        feature_dim: channels of its pooled features.
        params: number of parameters.
        gflops: of a forward pass over one image of its training size.
        origin: what else to record of it.
    """

    name: str
    load: Callable[[], nn.Module]
    feature_dim: int
    params: int
    gflops: float
    origin: dict[str, Any]

    def bytes(self, samples: int) -> int:
        """Memory for its weights and its features of `samples` images, fp32."""
        return 4 * (self.params + self.feature_dim * samples)


@dataclass(frozen=True)
class Target:
    """Models that see the same images.

    Attributes:
        candidates: the models.
        preprocessing: timm's data config of all of them.
        intake: how images become values for them; by default 8-bit RGB.
    """

    candidates: list[Candidate]
    preprocessing: dict[str, Any]
    intake: Intake = field(default_factory=Intake)

    def groups(self, samples: int, budget: int) -> Iterator[list[Candidate]]:
        """Consecutive candidates that together fit into `budget` bytes; one that does not fit is alone."""
        group: list[Candidate] = []
        for candidate in self.candidates:
            if group and sum(c.bytes(samples) for c in [*group, candidate]) > budget:
                yield group
                group = []
            group.append(candidate)
        if group:
            yield group


def default_subnets(grid: Grid) -> list[Subnet]:
    """The smallest and the largest, and the paper's sizes that lie in the grid."""
    return sorted({grid.smallest, grid.largest, *grid.aliases.values()})


def run_target(models: RunModels, subnets: Iterable[str | Subnet] | str | None, branch: str) -> Target:
    """Sub-networks of a run; None stands for `default_subnets`. Names of untrained ones begin with `UNTRAINED`.

    Raises:
        UserError: a name is not in the grid.
    """
    chosen = choose(models.grid, default_subnets(models.grid) if subnets is None else subnets)
    origin = {"step": models.step, "branch": branch}
    intake = Intake.of_experiment(models.config)
    prefix = "" if models.fingerprint else UNTRAINED
    candidates = [
        Candidate(
            prefix + subnet.name,
            partial(models.module, subnet),
            models.backbone.feature_dim(subnet),
            models.params(subnet),
            models.gflops(subnet),
            origin,
        )
        for subnet in chosen
    ]
    return Target(candidates, resolve_data_config({}, pretrained_cfg=preprocessing(models.config)), intake)


def directory_target(path: Path) -> Target:
    """One model in timm's directory format.

    Raises:
        UserError: timm cannot load it.
    """
    model = load_directory(path)
    data = resolve_data_config({}, model=model)
    params = sum(p.numel() for p in model.parameters())
    gflops, feature_dim = _measure(model, data["input_size"])
    values = json.loads((path / "config.json").read_text(encoding="utf-8")).get(VALUE_RANGE)
    intake = Intake(channels=data["input_size"][0], value_range=tuple(values) if values else None)
    return Target([Candidate(path.resolve().name, lambda: model, feature_dim, params, gflops, {})], data, intake)


def pixels_target(intake: Intake | None = None) -> Target:
    """Raw pixels as features: the whole image squeezed to 32 x 32."""
    intake = intake or Intake()
    channels = intake.channels
    squeezed = {
        "input_size": (channels, PIXEL_SIDE, PIXEL_SIDE),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
    }
    return Target([Candidate(PIXELS, nn.Flatten, channels * PIXEL_SIDE**2, 0, 0.0, {})], squeezed, intake)


def _measure(model: nn.Module, input_size: Sequence[int]) -> tuple[float, int]:
    """GFLOPs for one image, and channels of the pooled features."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which a run that evaluates has no use for

    counter = FlopCounterMode(display=False)
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:  # the counter does not know the CPU's fused attention
        module.fused_attn = False
    with counter:
        features: Tensor = pooled(model, torch.zeros(1, *input_size))
    for module in fused:
        module.fused_attn = True
    return counter.get_total_flops() / 1e9, features.shape[1]


def is_run(path: Path) -> bool:
    """Whether a path is a run directory and not a model's.

    Raises:
        UserError: it is neither.
    """
    if (path / "config.json").is_file():
        return False
    try:
        run_config(path)
    except UserError as error:
        if (path / "config.yaml").exists():
            raise
        raise UserError(
            f"{error.what} and no model", error.where, "name a run directory, or a directory that timm can load"
        ) from error
    return True
