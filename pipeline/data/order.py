"""Which record stands at a place of a source's stream: pure functions, so that the state of a run stays one integer.

A *piece* is what is permuted, fetched and kept as one: a shard, or a run of its records. A *lane* is a residue of the
position: with G lanes, positions g, g + G, g + 2G, ... are lane g. All pieces of a source stand in a line that is the
same in all epochs, each lane owns a stretch of it, and a rank takes positions of few lanes. So a node touches few
pieces, the same ones in every epoch, while a batch holds the same samples on any number of ranks. One lane is the plain
order.
"""

import functools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.philox import Purpose, philox

WORTH = 0.5
"""The portion of a piece that the ranks of a node must read for the node to fetch all of it."""


class Order(NamedTuple):
    """What decides the order of a set besides its seed; a run keeps it for as long as a segment of its data lasts."""

    lanes: int = 1
    piece_mb: int = 0

    @classmethod
    def of(cls, data: DataConfig) -> "Order":
        """As an experiment has it."""
        return cls(data.lanes, data.piece_mb)

    def __str__(self) -> str:
        pieces = f"pieces of {self.piece_mb} MB" if self.piece_mb else "whole shards"
        return f"{self.lanes} lane{'s' * (self.lanes > 1)} of {pieces}"


PLAIN = Order()
"""Of a run that never heard of lanes and pieces."""


class _Stretch(NamedTuple):
    """Of a lane in an epoch.

    Attributes:
        order: places in the line, as drawn for the epoch.
        low, high: the lane's records, counted along the line.
        starts: the lane's place at which each window starts.
    """

    order: np.ndarray
    low: int
    high: int
    starts: list[int]


class SampleOrder:
    """Which record stands at a position of the stream: all once per epoch, in an order of its own for each epoch.

    The pieces of a lane are permuted, then the samples within windows of consecutive pieces, so that reads stay local.

    Args:
        sizes: records of each piece.
        window: pieces whose records are permuted together.
        seed: of the data.
        source: number of the stream's random draws.
        lanes: see above.
    """

    def __init__(self, sizes: np.ndarray, window: int, seed: int, source: int = 0, lanes: int = 1) -> None:
        self.sizes, self.window, self.seed, self.source, self.lanes = np.asarray(sizes), window, seed, source, lanes
        self.samples = int(self.sizes.sum())
        self._starts = _cumulated(self.sizes)
        count = len(self.sizes)
        line = philox(seed, Purpose.LINE, source=source).permutation(count) if lanes > 1 else np.arange(count)
        self._line, self._along = line.astype(np.int32), _cumulated(self.sizes[line])
        # of each lane a few: one cache for all would keep what has long been read while other lanes are not asked for
        self._stretches: dict[int, Callable[[int], _Stretch]] = {}
        self._windows: dict[int, Callable[[int, int], np.ndarray]] = {}

    def __call__(self, position: int) -> int:
        epoch, lane, window, place = self._place(position)
        return int(self._records(epoch, lane, window)[place])

    def near(self, position: int) -> np.ndarray:
        """The records of the window in which a position is."""
        epoch, lane, window, _ = self._place(position)
        return self._records(epoch, lane, window)

    def ahead(self, position: int, shares: dict[int, float]) -> list[list[tuple[int, float]]]:
        """The pieces of the window in which a position is, and those of the window that its lane reads next.

        Args:
            shares: how much of each lane is read by whoever asks.

        Returns:
            Two lists of pieces, each with the portion of it that is read by them in this epoch.
        """
        epoch, lane, window, _ = self._place(position)
        found = [self._portions(epoch, shares, self._pieces(epoch, lane, window))]
        if window + 1 == len(self._stretch(epoch, lane).starts):
            epoch, window = epoch + 1, -1
        return [*found, self._portions(epoch, shares, self._pieces(epoch, lane, window + 1))]

    def portions(self, epoch: int, shares: dict[int, float]) -> np.ndarray:
        """How much of every piece is read in an epoch by whoever reads so much of each lane."""
        found = np.empty(len(self.sizes))
        found[self._line] = [portion for _, portion in self._portions(epoch, shares, np.arange(len(self.sizes)))]
        return found

    def _portions(self, epoch: int, shares: dict[int, float], places: np.ndarray) -> list[tuple[int, float]]:
        cuts, read = self._cuts(epoch), np.zeros(len(places))
        low, high = self._along[places], self._along[places + 1]
        for lane, share in shares.items():
            read += share * np.clip(np.minimum(high, cuts[lane + 1]) - np.maximum(low, cuts[lane]), 0, None)
        pieces = self._line[places]
        return list(zip(pieces.tolist(), (read / self.sizes[pieces]).tolist(), strict=True))

    def _place(self, position: int) -> tuple[int, int, int, int]:
        """Epoch, lane, its window, and the place within that."""
        epoch, place = divmod(position, self.samples)
        lane = position % self.lanes
        place = (place - (lane - epoch * self.samples) % self.lanes) // self.lanes  # how many the lane had before
        starts = self._stretch(epoch, lane).starts
        window = bisect_right(starts, place) - 1
        return epoch, lane, window, place - starts[window]

    def _cuts(self, epoch: int) -> np.ndarray:
        """Where along the line the lanes meet: each owns as many records as it has positions in the epoch."""
        first = (np.arange(self.lanes) - epoch * self.samples) % self.lanes
        return _cumulated((self.samples - first + self.lanes - 1) // self.lanes)

    def _stretch(self, epoch: int, lane: int) -> _Stretch:
        if lane not in self._stretches:
            self._stretches[lane] = functools.lru_cache(3)(functools.partial(self._draw_stretch, lane))
        return self._stretches[lane](epoch)

    def _records(self, epoch: int, lane: int, window: int) -> np.ndarray:
        if lane not in self._windows:
            self._windows[lane] = functools.lru_cache(3)(functools.partial(self._draw_window, lane))
        return self._windows[lane](epoch, window)

    def _draw_stretch(self, lane: int, epoch: int) -> _Stretch:
        low, high = map(int, self._cuts(epoch)[lane : lane + 2])
        first = int(np.searchsorted(self._along, low, side="right")) - 1
        last = int(np.searchsorted(self._along, high, side="left"))
        count = max(last - first, 0) if high > low else 0
        drawn = philox(self.seed, Purpose.SHARDS, epoch, lane, source=self.source).permutation(count)
        order = (first + drawn).astype(np.int32)
        sizes = np.minimum(self._along[order + 1], high) - np.maximum(self._along[order], low)
        return _Stretch(order, low, high, [0, *np.cumsum(sizes)[self.window - 1 : -1 : self.window].tolist()])

    def _draw_window(self, lane: int, epoch: int, window: int) -> np.ndarray:
        stretch = self._stretch(epoch, lane)
        ranges = []
        for place in self._pieces(epoch, lane, window):
            begin, end = max(self._along[place], stretch.low), min(self._along[place + 1], stretch.high)
            offset = self._starts[self._line[place]] - self._along[place]
            ranges.append(np.arange(begin + offset, end + offset))
        draws = philox(self.seed, Purpose.SAMPLES, epoch, lane << 32 | window, source=self.source)
        return draws.permutation(np.concatenate(ranges))

    def _pieces(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """Their places in the line."""
        return self._stretch(epoch, lane).order[window * self.window : (window + 1) * self.window]


def _cumulated(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def positions_of(
    sample: int, batch_size: int, rank: int, world_size: int, lanes: int = 1, begin: int = 0
) -> np.ndarray:
    """A rank's positions of the global batch that begins at `sample`: its slice of them, sorted by lane.

    Args:
        batch_size: of a rank.
        begin: the position from which lanes are counted.
    """
    if lanes == 1:
        return np.arange(sample + rank * batch_size, sample + (rank + 1) * batch_size)
    positions = np.arange(sample, sample + world_size * batch_size)
    by_lane = positions[np.argsort((positions - begin) % lanes, kind="stable")]
    return by_lane[rank * batch_size : (rank + 1) * batch_size]


def lanes_of(rank: int, world_size: int, lanes: int) -> dict[int, float]:
    """The lanes that a rank reads, and how much of each, over many batches."""
    low, high = rank * lanes / world_size, (rank + 1) * lanes / world_size
    shares = {lane: min(high, lane + 1) - max(low, lane) for lane in range(int(low), int(np.ceil(high)))}
    return {lane: share for lane, share in shares.items() if share > 1e-9}


def share_of_node(nodes: int, lanes: int, keeps: bool) -> tuple[float, float]:
    """The parts of a set that a node fetches in an epoch, of the node that fetches most: in whole pieces, which it may
    keep, and sample by sample.

    Args:
        keeps: it has a cache, for which it fetches whole pieces of the lanes that it reads for the most part.
    """
    found = []
    for node in range(nodes):
        shares = np.array(list(lanes_of(node, nodes, lanes).values()))
        whole = (shares >= WORTH - 1e-9) & keeps
        found.append((float(whole.sum()) / lanes, float(shares[~whole].sum()) / lanes))
    return max(found, key=sum)


def cut(bytes_: Sequence[int], samples: np.ndarray, piece_mb: int) -> np.ndarray:
    """Records of each piece of shards: their records in equal runs, as many as pieces of about that size fit into them.

    Args:
        bytes_: of each shard.
        samples: of each.
        piece_mb: megabytes (2^20 bytes); 0 leaves shards whole.
    """
    samples = np.asarray(samples, np.int64)
    if not piece_mb:
        return samples
    counts = np.clip(np.rint(np.asarray(bytes_) / (piece_mb << 20)).astype(np.int64), 1, np.maximum(samples, 1))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its shard
    size, more = np.divmod(samples, counts)
    return np.repeat(size, counts) + (number < np.repeat(more, counts))
