"""The stateless sample stream: the sample at a global position is a pure function of (seed, position)."""

import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.images import BadImage, Header
from pipeline.data.intake import Intake
from pipeline.data.mixing import WHOLE, Mix, Segment
from pipeline.data.order import PLAIN, Order, SampleOrder, positions_of
from pipeline.data.philox import Purpose, philox
from pipeline.data.reader import Dataset
from pipeline.errors import UserError

_MAX_SUBSTITUTES = 64


DECODE = "decode"
"""The reason of what only decoding finds."""


class Skip(NamedTuple):
    """A sample that was left out: `reason` as in `images.inspect`, or `decode`; `sample` is its number in the shard."""

    key: str
    shard: str
    reason: str
    position: int
    sample: int


class Picked(NamedTuple):
    """What a position is given: a usable image as `Intake.open` has it, and the records rejected on the way to it."""

    record: int
    data: Any
    header: Header
    rejected: tuple[tuple[int, str], ...]


class SampleStream:
    """Usable images by global position.

    A rejected sample is replaced by a record of its source drawn from (seed, position, attempt): from all in the plain
    order, else from the window that is being read. Rejection depends on the bytes alone: `reject` records a verdict
    reached later, by decoding, that any other process would reach as well.

    Args:
        unpack: what to make of a sample's bytes, `Intake.open`; by default that of 8-bit RGB.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        window: int,
        seed: int,
        max_pixels: int,
        segment: Segment = WHOLE,
        order: Order = PLAIN,
        unpack: Callable[[bytearray], tuple[Any, Header]] | None = None,
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self._unpack = unpack or Intake(max_pixels=max_pixels).open
        self._keeps_near = order != PLAIN
        self._mix = Mix([source.share for source in dataset.sources], seed, segment, order.lanes)
        self._orders = [SampleOrder(s.pieces, window, seed, s.stream, order.lanes) for s in dataset.sources]
        self._rejected: dict[int, str] = {}

    def reject(self, record: int, reason: str) -> None:
        self._rejected[record] = reason

    def order(self, position: int) -> int:
        """The record at a position."""
        number, place = self._place(position)
        return self.dataset.sources[number].first + self._orders[number](place)

    def positions(self, sample: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
        """Those of a rank in the global batch that begins at `sample`; see `positions_of`."""
        return positions_of(sample, batch_size, rank, world_size, self._mix.lanes, self._mix.segment.begin)

    def ahead(self, sample: int, shares: dict[int, float]) -> list[tuple[int, float]]:
        """The pieces that some lanes read next, the nearest first, each with the portion of it that they read.

        Args:
            sample: the position from which on they read.
            shares: how much is read of each lane.
        """
        windows: tuple[list[tuple[int, float]], list[tuple[int, float]]] = [], []
        for lane in shares:
            for source, order, place in zip(
                self.dataset.sources, self._orders, self._mix.next(sample, lane), strict=True
            ):
                for window, pieces in zip(windows, order.ahead(place, shares), strict=True):
                    window += [(source.first_piece + piece, portion) for piece, portion in pieces]
        return windows[0] + windows[1]

    def pick(self, position: int) -> Picked:
        """The image for a position.

        Raises:
            SourceError: a shard cannot be read: no fault of the sample, so nothing takes its place.
            UserError: too many substitutes in a row are unusable.
        """
        rejected: list[tuple[int, str]] = []
        for attempt in range(_MAX_SUBSTITUTES):
            record = self._candidate(position, attempt)
            if record not in self._rejected:
                try:
                    data, header = self._unpack(self.dataset.image(record))
                    return Picked(record, data, header, tuple(rejected))
                except BadImage as error:
                    self.reject(record, error.reason)
            rejected.append((record, self._rejected[record]))
        shard = str(self.dataset.shard(rejected[-1][0]))
        raise UserError(
            f"{_MAX_SUBSTITUTES} unusable images in a row", shard, f"poa shards verify {shlex.quote(shard)}"
        )

    def _candidate(self, position: int, attempt: int) -> int:
        if attempt == 0:
            return self.order(position)
        number, place = self._place(position)
        source, draws = self.dataset.sources[number], philox(self.seed, Purpose.SUBSTITUTE, position, attempt)
        if self._keeps_near:
            return source.first + int(draws.choice(self._orders[number].near(place)))
        return source.first + int(draws.integers(source.samples))

    def _place(self, position: int) -> tuple[int, int]:
        """Source and position in its stream; a single source from the start of the run has the run's positions."""
        if len(self._orders) == 1 and not self._mix.segment.begin:
            return 0, position
        return self._mix(position)
