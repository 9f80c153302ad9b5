"""What is known of a set of samples whose parts lie on different ranks: sums, and who holds how much."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.engine.distributed import Ranks

T = TypeVar("T")


def everywhere(ranks: Ranks | None, make: Callable[[], T]) -> T:
    """What `make` makes, once it has succeeded on every rank; an error on one is raised on all. Collective."""
    if ranks is None:
        return make()
    made: list[T] = []
    ranks.together(lambda: made.append(make()))
    return made[0]


def device_of(ranks: Ranks | None) -> torch.device:
    """Where to compute: on the device of the ranks, or of a process alone."""
    return ranks.device if ranks else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_one(ranks: Ranks | None, make: Callable[[], T]) -> T:
    """What `make` makes on rank 0, for every rank; an error there is raised on all. Collective."""
    return ranks.agree(make) if ranks else make()


def decoding_threads(ranks: Ranks | None) -> int:
    """This rank's part of the CPUs that the process may use, at most 16. Collective."""
    return min(ranks.cpu_share() if ranks else len(os.sched_getaffinity(0)), 16)


def sum_counts(counts: Counter[str], ranks: Ranks | None) -> dict[str, int]:
    """Counts by name over all ranks. Collective."""
    return dict(sum(ranks.gather(counts), Counter[str]()) if ranks else counts)


def total(x: Tensor, ranks: Ranks | None) -> Tensor:
    """The sum of every rank's `x`, which is on the ranks' device; as it is for a process alone. Collective."""
    if ranks is not None:
        dist.all_reduce(x)
    return x


def number(count: int, ranks: Ranks | None) -> int:
    """The sum of every rank's count. Collective."""
    return sum(ranks.gather(count)) if ranks else count


def in_turns(rows: Tensor, size: int, ranks: Ranks | None, device: torch.device | str) -> Iterator[tuple[bool, Tensor]]:
    """Every rank's rows on all ranks, `size` at a time, so that none holds all of them. Collective.

    Args:
        rows: `[n, D]` of this rank; others may have another n, 0 too.
        size: the same on all ranks.
        ranks: None for a process alone.
        device: that of the ranks.

    Yields:
        Whether the rows are this rank's own, and the rows.
    """
    for owner, length in enumerate(ranks.gather(len(rows)) if ranks else [len(rows)]):
        own = ranks is None or ranks.rank == owner
        for begin in range(0, length, size):
            count = min(size, length - begin)
            part = rows[begin : begin + count].to(device).contiguous() if own else torch.empty(0)
            if ranks and ranks.world_size > 1:
                part = part if own else torch.empty(count, rows.shape[1], dtype=rows.dtype, device=device)
                dist.broadcast(part, owner)
            yield own, part
