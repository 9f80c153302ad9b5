"""What the ranks agree on in every step before anything is updated, in one all-reduce."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.engine.groups import MODULES
from pipeline.measure.metrics import BANDS
from pipeline.method.tri_branch import TERMS, StepLosses

_NAMES = (*map("/".join, TERMS), "total")
BAD_VALUES = (*_NAMES, *(f"gradient/{module}" for module in MODULES))
"""All that may be named in `Agreement.bad`."""


@dataclass(frozen=True)
class Own:
    """What a rank adds of its own.

    Attributes:
        stop: it was asked to stop.
        skipped: samples it left out since the last step.
        flops: of its networks in this step.
        band: cost band of its elastic student.
        parts_saved: `Checkpoints.parts_finished`.
    """

    stop: bool
    skipped: int
    flops: float
    band: int
    parts_saved: int


@dataclass(frozen=True)
class Agreement:
    """What every rank knows then.

    Attributes:
        losses: mean over ranks by "term/branch", and "total"; NaN where one is not finite.
        norms: gradient norms before clipping, fp32 `[2]` on the device, in the order of `MODULES`.
        gradient_norms: the same by module, on the host.
        bad: values that were not finite on some rank, the causes before what follows from them.
        stop: some rank was asked to stop.
        skipped: samples left out on any rank.
        flops: of all ranks.
        parts_saved: parts of checkpoints that they have finished.
        band_steps, band_losses: elastic students trained and the sum of their DINO losses, over ranks, per cost band.
    """

    losses: dict[str, float]
    norms: Tensor
    gradient_norms: dict[str, float]
    bad: list[str]
    stop: bool
    skipped: int
    flops: float
    parts_saved: int
    band_steps: list[float]
    band_losses: list[float]


def agree(losses: StepLosses, gradient_squares: Tensor, own: Own) -> Agreement:
    """Sum over the ranks what each found. Collective; the step's one wait for the device.

    Args:
        losses: of this rank.
        gradient_squares: its squared gradient norms, `[2]` in the order of `MODULES`.
        own: what else it has to say.
    """
    device = gradient_squares.device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    values = torch.stack([*(losses.terms.get(term, zero).double() for term in TERMS), losses.total.double()])
    finite = values.isfinite()
    values = values.where(finite, zero)
    band = torch.tensor([float(own.band == i) for i in range(len(BANDS))], dtype=torch.float64, device=device)
    counts = torch.tensor(
        [float(own.stop), float(own.skipped), own.flops, float(own.parts_saved)], dtype=torch.float64, device=device
    )
    sums = _Sums(
        losses=values,
        not_finite=~finite,
        squares=gradient_squares,
        counts=counts,
        band_steps=band,
        band_losses=values[TERMS.index(("dino", "elastic"))] * band,
    )
    norms = sums.on_device("squares").sqrt().float()
    squares = dict(zip(MODULES, sums.on_host("squares"), strict=True))
    infinite = {name for name, ranks in zip(_NAMES, sums.on_host("not_finite"), strict=True) if ranks}
    stop, skipped, flops, parts_saved = sums.on_host("counts")
    return Agreement(
        losses={
            name: math.nan if name in infinite else total / dist.get_world_size()
            for name, total in zip(_NAMES, sums.on_host("losses"), strict=True)
        },
        norms=norms,
        gradient_norms={module: math.sqrt(s) if s >= 0 else math.nan for module, s in squares.items()},
        bad=_causes(infinite, squares),
        stop=stop > 0,
        skipped=round(skipped),
        flops=flops,
        parts_saved=round(parts_saved),
        band_steps=sums.on_host("band_steps"),
        band_losses=sums.on_host("band_losses"),
    )


def _causes(infinite: Iterable[str], squares: dict[str, float]) -> list[str]:
    """The total is not finite whenever a term is not, and gradients follow: name what came first alone."""
    infinite = set(infinite)
    causes = sorted(infinite - {"total"}) or sorted(infinite)
    return causes or [f"gradient/{module}" for module, s in squares.items() if not math.isfinite(s)]


class _Sums:
    """Sums over the ranks of named vectors, by one all-reduce and one copy to the host, in fp64."""

    def __init__(self, **vectors: Tensor):
        self._packed = torch.cat([vector.double() for vector in vectors.values()])
        dist.all_reduce(self._packed)
        self._host = self._packed.tolist()
        self._places, start = {}, 0
        for name, vector in vectors.items():
            self._places[name] = slice(start, start + len(vector))
            start += len(vector)

    def on_device(self, name: str) -> Tensor:
        return self._packed[self._places[name]]

    def on_host(self, name: str) -> list[float]:
        return self._host[self._places[name]]
