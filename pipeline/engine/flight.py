"""Collectives that are under way while this rank computes something else."""

from collections import deque

import torch.distributed as dist
from torch import Tensor


class Flight:
    """Some of them, which every rank begins in the same order."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()

    def add(self, work: dist.Work | None, vector: Tensor) -> None:
        """Take over one that has begun, and what it reads, which must stay as it is until it has landed."""
        assert work is not None, "begun without `async_op`"
        self._under_way.append((work, vector))

    def land(self, leaving: int = 0) -> None:
        """Wait for all but the last few. On a GPU what comes next waits, not the host.

        Raises:
            RuntimeError: one failed.
        """
        while len(self._under_way) > leaving:
            work, _ = self._under_way.popleft()
            work.wait()
