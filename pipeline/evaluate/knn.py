"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018; the protocol of DINO)."""

from typing import Any

import torch
from torch import Tensor

from pipeline.engine.distributed import Ranks
from pipeline.evaluate.neighbours import Bank
from pipeline.evaluate.spread import number

NEIGHBOURS = 20
TEMPERATURE = 0.07
TOP = 5
_SIMILARITIES = 1 << 26  # elements of one chunk: 256 MiB


def knn_votes(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
) -> Tensor:
    """Let the nearest training samples vote, each with weight exp(cosine similarity / temperature); exact.

    Args:
        train: `[N, D]` features, of this rank if there are several.
        labels: `[N]` int64 class indices, any integers.
        queries: `[Q, D]`, of this rank.
        neighbours: how many vote; all of `train` if there are fewer.
        temperature: of the weights.
        device: where to compute.
        ranks: processes that call this together, each with its part of the training samples and of the queries.

    Returns:
        Classes by falling vote, int64 `[Q, min(5, classes)]`; -1 where no neighbour votes for any further class.
    """
    known = labels.unique()
    if ranks:
        known = torch.cat(ranks.gather(known)).unique()
    index = torch.searchsorted(known, labels).to(device)
    known = known.to(device)
    bank = Bank(train, ranks, device)

    def vote(similarity: Tensor, nearest: Tensor) -> Tensor:
        weights = ((similarity - 1) / temperature).exp()  # the common factor exp(1 / temperature) left out
        votes = torch.zeros(len(similarity), len(known), device=device)
        return votes.scatter_add_(1, index[nearest], weights)

    chunks = []
    for votes in bank.ask(queries, min(neighbours, bank.size), vote, _SIMILARITIES):
        best, classes = votes.topk(min(TOP, len(known)))
        chunks.append(known[classes].where(best > 0, -1).cpu())
    return torch.cat(chunks) if chunks else torch.empty(0, 1, dtype=torch.int64)


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Accuracy of 20-NN; with `ranks` each holds its part of both sets.

    Returns:
        accuracy and top5 as fractions of 1, neighbours, temperature.
    """
    classes = knn_votes(train, train_labels, val, device=device, ranks=ranks)
    hits = (classes == val_labels[:, None]) & (classes >= 0)
    asked, first, any_ = (number(int(x), ranks) for x in (len(val_labels), hits[:, 0].sum(), hits.any(1).sum()))
    return {
        "accuracy": first / asked,
        "top5": any_ / asked,
        "neighbours": min(NEIGHBOURS, number(len(train), ranks)),
        "temperature": TEMPERATURE,
    }
