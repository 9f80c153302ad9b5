"""Several sources in one stream, by integer shares: which source stands at a position, and where in its own stream.

A block is `ROWS` positions, in an order drawn for it, in which every source has exactly its share. Each source is an
endless stream of its own epochs, so nothing but the position is needed to go on. Other shares or sources would shift
all that follows: a run counts them as a new *segment*, which begins at a position and knows how far each source was.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.data.philox import Purpose, philox
from pipeline.errors import UserError

ROWS = 1000


class Segment(NamedTuple):
    """A part of a run in which sources and shares are the same.

    Attributes:
        number: from 0.
        begin: its first global position.
        starts: how many samples of each source were taken before it; empty for none of any.
    """

    number: int = 0
    begin: int = 0
    starts: tuple[int, ...] = ()


WHOLE = Segment()
"""Of a run whose sources never changed."""


def integer_shares(weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """Shares of a block in proportion to weights, by largest remainders.

    Raises:
        UserError: a source would have none.
    """
    wanted = np.asarray(weights, float) / np.sum(weights) * ROWS
    shares = np.floor(wanted).astype(int)
    shares[np.argsort(shares - wanted, kind="stable")[: ROWS - shares.sum()]] += 1
    for name, share in zip(names, shares, strict=True):
        if not share:
            fix = "give it more, or leave it out"
            raise UserError(f"the weight of source {name} is less than a thousandth of all", "data.train", fix)
    return shares.tolist()


class Mix:
    """Global position -> (number of the source, position in its stream)."""

    def __init__(self, shares: Sequence[int], seed: int, segment: Segment = WHOLE) -> None:
        self.shares, self.seed, self.segment = shares, seed, segment
        self._starts = segment.starts or (0,) * len(shares)
        self._block = functools.lru_cache(4)(self._draw)

    def __call__(self, position: int) -> tuple[int, int]:
        block, place = divmod(position - self.segment.begin, ROWS)
        sources, before = self._block(block)
        source = int(sources[place])
        return source, self._starts[source] + block * self.shares[source] + int(before[place])

    def used(self, position: int) -> list[int]:
        """How many samples of each source stand before a position of this segment, earlier segments included."""
        block, place = divmod(position - self.segment.begin, ROWS)
        counts = np.bincount(self._block(block)[0][:place], minlength=len(self.shares))
        starts = zip(self._starts, self.shares, counts, strict=True)
        return [start + block * share + int(count) for start, share, count in starts]

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of every place of a block, and how many of the same source stand before it there."""
        sources = np.repeat(np.arange(len(self.shares)), self.shares)
        sources = philox(self.seed, Purpose.MIX, self.segment.number, block).permutation(sources)
        before = np.empty(ROWS, np.int64)
        for source, share in enumerate(self.shares):
            before[sources == source] = np.arange(share)
        return sources, before
