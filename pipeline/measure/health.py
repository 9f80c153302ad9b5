"""Signs of collapse: how targets spread over prototypes and features over their space.

Letters: R rows (global crops of a rank), D channels, H heads with K prototypes each.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.distillation import Targets, row_logsumexp
from pipeline.elastic.transfer import Late
from pipeline.measure.metrics import BANDS

SLOTS = ("teacher", "intact", *BANDS)
_SCALARS = 5  # ranks, rows, KL, effective rank, deviation


class BranchHealth(NamedTuple):
    """One branch, or the elastic students of one band, over all ranks.

    Attributes:
        entropy: of the mean distribution, nats, mean over heads.
        uniform_kl: mean KL(p || uniform) of single rows, nats, mean over heads.
        used: share of prototypes whose mean probability exceeds a tenth of 1/K, mean over heads.
        effective_rank, deviation: of the cls features, mean over ranks.
    """

    entropy: float
    uniform_kl: float
    used: float
    effective_rank: float
    deviation: float


class Reduced(NamedTuple):
    """Sums over the ranks, per slot, on their way to the host."""

    slots: list[str]
    sums: Late

    def read(self) -> dict[str, BranchHealth]:
        """Health by slot, "elastic" for all bands together; without slots that no rank trained in this step."""
        health = {}
        for slot, (ranks, _, kl, effective, deviation, entropy, used) in zip(
            self.slots, self.sums.tolist(), strict=True
        ):
            if ranks:
                health[slot] = BranchHealth(entropy, kl / ranks, used, effective / ranks, deviation / ranks)
        return health


class Probe:
    """Looks at one step from inside and keeps sums, never logits.

    Args:
        prototypes: K per head.
        band: position in `BANDS` of this rank's elastic student, if there is one.
        student_temperature: of the students' predictions.
        device: where the step runs.
        impl: implementation of the kernels.
    """

    def __init__(
        self, prototypes: Sequence[int], band: int | None, student_temperature: float, device: torch.device, impl: str
    ):
        self.prototypes, self.band, self.impl = list(prototypes), band, impl
        self.student_temperature = student_temperature
        self._mass = torch.zeros(len(SLOTS), sum(prototypes), device=device)
        self._scalars = torch.zeros(len(SLOTS), _SCALARS, device=device, dtype=torch.float64)

    @torch.no_grad()
    def teacher(self, targets: list[Targets], cls: Tensor) -> None:
        """Targets of the cls tokens per head, and the teacher's features `[R, D]`."""
        self._look(SLOTS.index("teacher"), targets, cls)

    @torch.no_grad()
    def student(self, branch: str, logits: list[Tensor], cls: Tensor) -> None:
        """Logits `[R, K]` per head and features `[R, D]` of the "intact" or "elastic" student."""
        assert branch == "intact" or self.band is not None
        slot = SLOTS.index("intact" if branch == "intact" or self.band is None else BANDS[self.band])
        temperature = self.student_temperature
        rows = [-row_logsumexp(x, temperature, impl=self.impl) for x in logits]
        predictions = [Targets(x, row, None, temperature) for x, row in zip(logits, rows, strict=True)]
        self._look(slot, predictions, cls)

    @torch.no_grad()
    def reduce(self) -> "Reduced":
        """Join the ranks; collective."""
        if dist.is_initialized():
            dist.all_reduce(self._mass)
            dist.all_reduce(self._scalars)
        mass = {slot: self._mass[i] for i, slot in enumerate(SLOTS)}
        scalars = {slot: self._scalars[i] for i, slot in enumerate(SLOTS)}
        mass["elastic"] = self._mass[-len(BANDS) :].sum(0)
        scalars["elastic"] = self._scalars[-len(BANDS) :].sum(0)
        summary = torch.stack([torch.stack([*scalars[s], *self._spread(mass[s], scalars[s][1])]) for s in mass])
        return Reduced(list(mass), Late(summary))

    def _look(self, slot: int, distributions: list[Targets], cls: Tensor) -> None:
        divergence = torch.zeros((), device=cls.device, dtype=torch.float64)
        for mass, target in zip(self._mass[slot].split(self.prototypes), distributions, strict=True):
            log_p = target.logits.float() / target.temperature + target.row[:, None]
            if target.col is not None:
                log_p = log_p + target.col
            p = log_p.exp()
            mass += p.sum(0)
            entropy = -(p * log_p).nan_to_num(neginf=0.0).sum(1)  # p = 0 has log p = -inf and adds nothing
            divergence += (math.log(p.shape[1]) - entropy).mean()
        one = torch.ones((), device=cls.device, dtype=torch.float64)
        features = cls.double()
        self._scalars[slot] = torch.stack(
            [one, one * len(cls), divergence / len(distributions), effective_rank(features), deviation(features)]
        )

    def _spread(self, mass: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Entropy of the mean distribution and share of prototypes in use, means over heads."""
        entropies, used = [], []
        for head in mass.double().split(self.prototypes):
            p = head / rows
            entropies.append(-torch.special.xlogy(p, p).sum())
            used.append((p > 0.1 / len(p)).double().mean())
        return torch.stack(entropies).mean(), torch.stack(used).mean()


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007), of uncentred features.

    Without centring a common direction counts: features that all agree have effective rank 1, as RankMe (Garrido et
    al. 2023) has it. NaN if a feature is not finite.

    Args:
        features: `[R, D]`.
    """
    finite = features.isfinite().all()
    x = features.double().nan_to_num(0.0, 0.0, 0.0)
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=1e-30)
    rank = (-torch.special.xlogy(p, p).sum()).exp()
    return rank.where(finite, torch.full_like(rank, math.nan))


def deviation(features: Tensor) -> Tensor:
    """Root mean square distance of the l2-normalised rows from their mean: 0 if all agree, 1 if they cancel out."""
    z = torch.nn.functional.normalize(features.double(), dim=1)
    return (z - z.mean(0)).square().sum(1).mean().sqrt()


def largest_entropy(prototypes: Sequence[int]) -> float:
    """Entropy of uniform targets, mean over heads."""
    return sum(map(math.log, prototypes)) / len(prototypes)
