"""Several sources in one stream, by integer shares: which source stands at a position, and where in its own stream.

A block is `ROWS` positions of a lane (see `order`), in an order drawn for it, in which every source has exactly its
share. Each source is an endless stream of its own epochs, so nothing but the position is needed to go on. Other shares
or sources would shift all that follows: a run counts them as a new *segment*, which begins at a position and knows how
far each source was.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.data.philox import Purpose, philox
from pipeline.errors import UserError

ROWS = 1000

Start = int | tuple[int, ...]


class Segment(NamedTuple):
    """A part of a run in which sources and shares are the same.

    Attributes:
        number: from 0.
        begin: its first global position.
        starts: of each source, how many samples were taken before it: of its stream as a whole, or of every lane; empty
            for none of any.
    """

    number: int = 0
    begin: int = 0
    starts: "tuple[Start, ...]" = ()


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
    """Global position -> (number of the source, position in its stream), both of the same lane."""

    def __init__(self, shares: Sequence[int], seed: int, segment: Segment = WHOLE, lanes: int = 1) -> None:
        self.shares, self.seed, self.segment, self.lanes = shares, seed, segment, lanes
        self._starts = [_of_lanes(start, lanes) for start in segment.starts or (0,) * len(shares)]
        self._block = functools.lru_cache(4 * lanes)(self._draw)

    def __call__(self, position: int) -> tuple[int, int]:
        row, lane = divmod(position - self.segment.begin, self.lanes)
        block, place = divmod(row, ROWS)
        sources, before = self._block(block, lane)
        source = int(sources[place])
        taken = self._starts[source][lane] + block * self.shares[source] + int(before[place])
        return source, taken * self.lanes + lane

    def lane(self, position: int) -> int:
        return (position - self.segment.begin) % self.lanes

    def used(self, position: int) -> list[Start]:
        """What of each source stands before a position of this segment, earlier segments included: as `starts`."""
        taken = [self._used(position, lane) for lane in range(self.lanes)]
        return [of_lanes if self.lanes > 1 else of_lanes[0] for of_lanes in zip(*taken, strict=True)]

    def next(self, position: int, lane: int) -> list[int]:
        """The position in each source's stream that a lane takes next."""
        return [taken * self.lanes + lane for taken in self._used(position, lane)]

    def _used(self, position: int, lane: int) -> list[int]:
        rows = max(position - self.segment.begin - lane + self.lanes - 1, 0) // self.lanes
        block, place = divmod(rows, ROWS)
        counts = np.bincount(self._block(block, lane)[0][:place], minlength=len(self.shares))
        starts = zip(self._starts, self.shares, counts, strict=True)
        return [start[lane] + block * share + int(count) for start, share, count in starts]

    def _draw(self, block: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of every place of a block, and how many of the same source stand before it there."""
        sources = np.repeat(np.arange(len(self.shares)), self.shares)
        sources = philox(self.seed, Purpose.MIX, self.segment.number, block, source=lane).permutation(sources)
        before = np.empty(ROWS, np.int64)
        for source, share in enumerate(self.shares):
            before[sources == source] = np.arange(share)
        return sources, before


def _of_lanes(start: Start, lanes: int) -> tuple[int, ...]:
    """How many samples of each lane were taken, if so many of the stream were."""
    if isinstance(start, tuple):
        return start
    return tuple(max(start - lane + lanes - 1, 0) // lanes for lane in range(lanes))
