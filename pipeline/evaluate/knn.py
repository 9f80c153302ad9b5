"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018; the protocol of DINO)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.engine.distributed import Ranks

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
) -> Tensor:
    """Let the nearest training samples vote, each with weight exp(cosine similarity / temperature); exact.

    Args:
        train: `[N, D]` features.
        labels: `[N]` int64 class indices, any integers.
        queries: `[Q, D]`.
        neighbours: how many vote; all of `train` if there are fewer.
        temperature: of the weights.
        device: where to compute.

    Returns:
        Classes by falling vote, int64 `[Q, min(5, classes)]`; -1 where no neighbour votes for any further class.
    """
    known, index = labels.unique(return_inverse=True)
    known, index = known.to(device), index.to(device)
    bank = F.normalize(train.to(device), dim=1)
    count = min(neighbours, len(bank))
    chunks = []
    for chunk in queries.split(max(_SIMILARITIES // max(len(bank), 1), 1)):
        similarity, nearest = (F.normalize(chunk.to(device), dim=1) @ bank.T).topk(count)
        weights = ((similarity - 1) / temperature).exp()  # the common factor exp(1 / temperature) left out
        votes = torch.zeros(len(chunk), len(known), device=device).scatter_add_(1, index[nearest], weights)
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
    """Accuracy of 20-NN; with `ranks` the queries are shared out.

    Returns:
        accuracy and top5 as fractions of 1, neighbours, temperature.
    """
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    classes = knn_votes(train, train_labels, val[rank::world_size], device=device)
    hits = (classes == val_labels[rank::world_size, None]) & (classes >= 0)
    counts = (int(hits[:, 0].sum()), int(hits.any(1).sum()))
    if ranks:
        counts = tuple(map(sum, zip(*ranks.gather(counts), strict=True)))  # type: ignore[assignment]
    return {
        "accuracy": counts[0] / len(val_labels),
        "top5": counts[1] / len(val_labels),
        "neighbours": min(NEIGHBOURS, len(train)),
        "temperature": TEMPERATURE,
    }
