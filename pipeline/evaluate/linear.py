"""Linear probe: multinomial logistic regression on frozen features, its regularisation chosen on a held-out split.

The problem is convex and solved by L-BFGS in fp64 on the device of the features. Each rank holds its part of the
samples and of loss and gradient: one short all-reduce per evaluation of the loss, and nobody waits for a solver.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.engine.distributed import Ranks
from pipeline.evaluate.spread import number, total

STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # C, the inverse weight of the penalty, on features of unit variance
HELD_OUT = 0.2
_ITERATIONS = 500
_ROWS = 1 << 16  # in fp64 at a time
_SOLVED = 1e-4  # largest entry of the gradient of the mean loss


class _Samples(NamedTuple):
    """This rank's part of some samples: `[n, D]` features and `[n]` class numbers from 0."""

    x: Tensor
    y: Tensor

    def where(self, mask: Tensor) -> "_Samples":
        return _Samples(self.x[mask], self.y[mask])


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
    records: Tensor | None = None,
) -> dict[str, Any]:
    """Accuracy of the probe; with `ranks` each holds its part of both sets.

    Args:
        train, val: `[N, D]` features.
        train_labels, val_labels: `[N]` int64 class indices.
        ranks: the processes that call this together.
        device: where to solve.
        records: `[N]` numbers of the training samples among those of all ranks, by which they are held out.

    Returns:
        accuracy and train_accuracy as fractions of 1, the chosen C, at which end of the grid it lies (`edge`), and
        whether the solver converged.
    """
    known = train_labels.unique()
    if ranks:
        known = torch.cat(ranks.gather(known)).unique()
    if len(known) == 1:
        hits, asked = number(int((val_labels == known[0]).sum()), ranks), number(len(val_labels), ranks)
        return {"accuracy": hits / asked, "train_accuracy": 1.0, "C": None, "grid_edge": None, "converged": True}
    own = _Samples(train.to(device), torch.searchsorted(known, train_labels).to(device))
    apart = held_out(torch.arange(len(train)) if records is None else records, ranks).to(device)
    fitted, chooser = own.where(~apart), own.where(apart)
    # a label that training does not know is nobody's
    place = torch.searchsorted(known, val_labels).clamp(max=len(known) - 1)
    asked_of = _Samples(val.to(device), place.where(known[place] == val_labels, -1).to(device))
    probe = _Probe(len(known), ranks, device)
    scores = {c: probe.held_out_score(c, fitted, chooser) for c in STRENGTHS}
    chosen = max(STRENGTHS, key=lambda c: scores[c])  # the strongest regularisation of equals
    converged = probe.fit(chosen, own)
    return {
        "accuracy": probe.score(asked_of),
        "train_accuracy": probe.score(own),
        "C": chosen,
        "grid_edge": edge([scores[c] for c in STRENGTHS]),
        "converged": converged,
    }


def edge(scores: Sequence[float]) -> str | None:
    """At which end of a rising grid the best score is, if no other equals it: the best value may lie beyond."""
    if len(scores) > 1 and scores[0] > max(scores[1:]):
        return "smallest"
    if len(scores) > 1 and scores[-1] > max(scores[:-1]):
        return "largest"
    return None


def warn_of_edge(name: str, what: str, value: float | None, where: str | None) -> None:
    """Say that a better value may lie beyond a grid."""
    if where:
        print(f"warning: {name}: the best {what} is the {where} there is, {value:g}", file=sys.stderr)


def held_out(records: Tensor, ranks: Ranks | None) -> Tensor:
    """A fifth of the samples, the same whichever rank holds them."""
    last = int(records.max()) if len(records) else -1
    count = 1 + (max(ranks.gather(last)) if ranks else last)
    drawn = np.random.default_rng(0).random(count)
    return torch.from_numpy(drawn[records.numpy()] < HELD_OUT)


class _Probe:
    """A linear classifier over standardised features."""

    def __init__(self, classes: int, ranks: Ranks | None, device: torch.device | str):
        self.classes, self.ranks, self.device = classes, ranks, device
        self.mean = self.scale = self.weight = self.bias = torch.empty(0)

    def held_out_score(self, strength: float, fitted: _Samples, asked: _Samples) -> float:
        present = total(torch.bincount(fitted.y, minlength=self.classes), self.ranks)
        if not number(len(asked.y), self.ranks) or int((present > 0).sum()) < 2:
            return 0.0  # a handful of samples: nothing to choose by
        self.fit(strength, fitted)
        return self.score(asked)

    def fit(self, strength: float, samples: _Samples) -> bool:
        """Solve for weights; whether that came to an end."""
        self._standardise(samples.x)
        count = number(len(samples.y), self.ranks)
        width = len(self.mean)
        w = torch.zeros(width + 1, self.classes, dtype=torch.float64, device=self.device, requires_grad=True)
        solver = torch.optim.LBFGS(
            [w],
            max_iter=_ITERATIONS,
            tolerance_grad=0.1 * _SOLVED,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss = torch.zeros((), dtype=torch.float64, device=self.device)
            gradient = torch.zeros_like(w)
            for x, y in zip(samples.x.split(_ROWS), samples.y.split(_ROWS), strict=True):
                part = F.cross_entropy(self._standard(x) @ w[:-1] + w[-1], y, reduction="sum") / count
                gradient += torch.autograd.grad(part, w)[0]
                loss += part.detach()
            packed = total(torch.cat([gradient.flatten(), loss[None]]), self.ranks)
            kept = w.detach()[:-1]
            w.grad = packed[:-1].view_as(w)
            w.grad[:-1] += kept / (strength * count)
            return packed[-1] + kept.square().sum() / (2 * strength * count)

        solver.step(closure)
        closure()
        assert w.grad is not None
        self.weight, self.bias = w.detach()[:-1], w.detach()[-1]
        return bool(w.grad.abs().max() <= _SOLVED)

    def score(self, samples: _Samples) -> float:
        """Share of the samples that are classified rightly, over all ranks."""
        hits = 0
        for x, y in zip(samples.x.split(_ROWS), samples.y.split(_ROWS), strict=True):
            hits += int(((self._standard(x) @ self.weight + self.bias).argmax(1) == y).sum())
        return number(hits, self.ranks) / number(len(samples.y), self.ranks)

    def _standard(self, x: Tensor) -> Tensor:
        return (x.double() - self.mean) / self.scale

    def _standardise(self, x: Tensor) -> None:
        """Mean and deviation over all ranks, the latter 1 where a feature is constant."""
        count = number(len(x), self.ranks)
        sums, squares = torch.zeros(2, x.shape[1], dtype=torch.float64, device=self.device)
        for part in x.split(_ROWS):
            sums += part.double().sum(0)
        self.mean = total(sums, self.ranks) / count
        for part in x.split(_ROWS):
            squares += (part.double() - self.mean).square().sum(0)
        deviation = (total(squares, self.ranks) / count).sqrt()
        self.scale = deviation.where(deviation > 10 * torch.finfo(torch.float32).eps * self.mean.abs(), 1.0)
