"""What the ranks agree on in every step before anything is updated, in one all-reduce.

Whether there is an update is settled on the device; the host reads the values when the next step is under way.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.elastic.transfer import Late, to_device
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
        band: cost band of its elastic student, if it has one.
        parts_saved: `Checkpoints.parts_finished`.
        no_data: it could not get its batch and trained on something else.
    """

    stop: bool
    skipped: int
    flops: float
    band: int | None
    parts_saved: int
    no_data: bool = False


@dataclass(frozen=True)
class Agreement:
    """What every rank knows of a step.

    Attributes:
        losses: mean over ranks by "term/branch", and "total"; NaN where one is not finite. Without elastic students
            there are no terms of theirs.
        gradient_norms: before clipping, by module.
        bad: values that were not finite on some rank, the causes before what follows from them.
        stop: some rank was asked to stop.
        skipped: samples left out on any rank.
        flops: of all ranks.
        parts_saved: parts of checkpoints that they have finished.
        no_data: some rank had no batch, so the step must not count.
        band_steps, band_losses: elastic students trained and the sum of their DINO losses, over ranks, per cost band.
    """

    losses: dict[str, float]
    gradient_norms: dict[str, float]
    bad: list[str]
    stop: bool
    skipped: int
    flops: float
    parts_saved: int
    band_steps: list[float]
    band_losses: list[float]
    no_data: bool = False


class Agreed:
    """What the ranks agree on, on the device at once, on the host when it is read.

    Attributes:
        norms: gradient norms before clipping, fp32 `[2]`, in the order of `MODULES`.
        good: whether all values are finite on all ranks and all had data, 1 or 0, an fp32 scalar.
    """

    def __init__(self, **vectors: Tensor):
        packed = torch.cat([vector.double() for vector in vectors.values()])
        dist.all_reduce(packed)
        self._names, self._sizes = list(vectors), [len(vector) for vector in vectors.values()]
        sums = dict(zip(self._names, packed.split(self._sizes), strict=True))
        self.norms = sums["squares"].sqrt().float()
        finite = (sums["not_finite"] == 0).all() & sums["squares"].isfinite().all()
        self.good = (finite & (sums["no_data"][0] == 0)).float()
        self._packed = Late(packed)

    def read(self) -> Agreement:
        """Wait for the values, if need be."""
        values = self._packed.tolist()
        sums, start = {}, 0
        for name, size in zip(self._names, self._sizes, strict=True):
            sums[name] = values[start : start + size]
            start += size
        squares = dict(zip(MODULES, sums["squares"], strict=True))
        infinite = {name for name, ranks in zip(_NAMES, sums["not_finite"], strict=True) if ranks}
        stop, skipped, flops, parts_saved = sums["counts"]
        elastic = sum(sums["band_steps"]) > 0
        return Agreement(
            losses={
                name: math.nan if name in infinite else total / dist.get_world_size()
                for name, total in zip(_NAMES, sums["losses"], strict=True)
                if elastic or not name.endswith("/elastic")
            },
            gradient_norms={module: math.sqrt(s) if s >= 0 else math.nan for module, s in squares.items()},
            bad=_causes(infinite, squares),
            stop=stop > 0,
            skipped=round(skipped),
            flops=flops,
            parts_saved=round(parts_saved),
            band_steps=sums["band_steps"],
            band_losses=sums["band_losses"],
            no_data=sums["no_data"][0] > 0,
        )


def agree(losses: StepLosses, gradient_squares: Tensor, own: Own) -> Agreed:
    """Sum over the ranks what each found. Collective; the host waits for nothing.

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
    drawn = [float(own.band == i) for i in range(len(BANDS))]
    told = to_device(
        torch.tensor(
            [float(own.stop), float(own.skipped), own.flops, float(own.parts_saved), float(own.no_data), *drawn],
            dtype=torch.float64,
        ),
        device,
    )
    counts, no_data, band = told.split([4, 1, len(BANDS)])
    return Agreed(
        losses=values,
        not_finite=~finite,
        squares=gradient_squares,
        counts=counts,
        no_data=no_data,
        band_steps=band,
        band_losses=values[TERMS.index(("dino", "elastic"))] * band,
    )


def _causes(infinite: Iterable[str], squares: dict[str, float]) -> list[str]:
    """The total is not finite whenever a term is not, and gradients follow: name what came first alone."""
    infinite = set(infinite)
    causes = sorted(infinite - {"total"}) or sorted(infinite)
    return causes or [f"gradient/{module}" for module, s in squares.items() if not math.isfinite(s)]
