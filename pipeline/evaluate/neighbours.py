"""The nearest of many features, which lie spread over ranks; exact."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.engine.distributed import Ranks
from pipeline.evaluate.spread import in_turns, number, total

Vote = Callable[[Tensor, Tensor], Tensor]
"""Similarities and indices `[q, k]` of this rank's rows among the nearest -> what they say of each query, `[q, C]`."""


class Bank:
    """Features that are known, each rank holding a part of them.

    Args:
        features: `[n, D]` of this rank, not normalised.
        ranks: processes that hold the other parts; None if this one has all.
        device: where to compute, that of the ranks.

    Attributes:
        size: rows of all ranks.
    """

    def __init__(self, features: Tensor, ranks: Ranks | None = None, device: torch.device | str = "cpu"):
        self._own = F.normalize(features.to(device), dim=1)
        self._ranks, self._device = ranks, device
        self.size = number(len(features), ranks)

    def ask(self, queries: Tensor, count: int, vote: Vote, similarities: int) -> Iterator[Tensor]:
        """Let the `count` rows of the whole bank vote that are nearest to each query by cosine. Collective.

        Of rows at the very same distance, which count is left open.

        Args:
            queries: `[q, D]` of this rank, not normalised.
            count: how many vote.
            vote: on this rank's part of them; similarities of rows that are not among the nearest are -inf.
            similarities: how many to hold at a time.

        Yields:
            For parts of this rank's queries in turn, the sum of the votes over all ranks, `[., C]`.
        """
        rows = max(similarities // max(self.size, 1), 1)
        for own, part in in_turns(queries, rows, self._ranks, self._device):
            votes = total(vote(*self._nearest(F.normalize(part, dim=1), count)), self._ranks)
            if own:
                yield votes

    def _nearest(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The part of the whole bank's nearest that lies here; `[q, k]`, k at most the rows that lie here."""
        found = min(count, len(self._own))
        similarity, index = (queries @ self._own.T).topk(found)
        if self._ranks is None or self._ranks.world_size == 1:
            return similarity, index
        padded = F.pad(similarity, (0, count - found), value=-torch.inf).contiguous()
        everywhere = [torch.empty_like(padded) for _ in range(self._ranks.world_size)]
        dist.all_gather(everywhere, padded)
        nearest = torch.cat(everywhere, 1).topk(count).indices
        chosen = torch.zeros(len(queries), count * self._ranks.world_size, dtype=torch.bool, device=queries.device)
        begin = self._ranks.rank * count
        mine = chosen.scatter_(1, nearest, True)[:, begin : begin + found]
        return similarity.where(mine, -torch.inf), index
