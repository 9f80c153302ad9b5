"""What one rank reads: its positions of every global batch, many at once where they are far away, kept on its node."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.intake import Intake
from pipeline.data.mixing import WHOLE, Segment
from pipeline.data.order import Order, lanes_of
from pipeline.data.reader import Dataset
from pipeline.data.remote.cache import Cache
from pipeline.data.stream import Picked, SampleStream

REQUESTS = 32  # in flight at once to a store, if the experiment does not say


class Reading:
    """The samples of a rank, and their way here.

    Args:
        data: shards, order and cache.
        rank, world_size: this process among those that share the stream.
        dataset: `data.train` in pieces of `data.piece_mb`, if it is open already.
        segment: of the run, if its sources or weights have changed.
        intake: what to make of a sample's bytes; by default as `data` says of 8-bit RGB.

    Raises:
        UserError: see `Dataset` and `Cache`.
    """

    def __init__(
        self,
        data: DataConfig,
        rank: int = 0,
        world_size: int = 1,
        dataset: Dataset | None = None,
        segment: Segment = WHOLE,
        intake: Intake | None = None,
    ) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size
        self.dataset = dataset or Dataset(data.train, data.piece_mb, data.image)
        self.stream = SampleStream(
            self.dataset,
            window=data.window,
            seed=data.seed,
            max_pixels=data.max_pixels,
            segment=segment,
            order=Order.of(data),
            unpack=(intake or Intake.of(data)).open,
        )
        self.cache = self.dataset.cache = self._open_cache()
        self._lanes = lanes_of(rank, world_size, data.lanes)
        self._wanted: list[tuple[int, float]] = []
        at_once = data.reads or (REQUESTS if self.dataset.is_remote else 1)
        self._requests = ThreadPoolExecutor(at_once, "poa-fetch") if at_once > 1 else None

    def positions(self, sample: int) -> np.ndarray:
        """This rank's positions of the global batch that begins at `sample`."""
        return self.stream.positions(sample, self.data.batch_size, self.rank, self.world_size)

    def pick(self, positions: Iterable[int]) -> list[Picked]:
        """Their images; see `SampleStream.pick`."""
        return list((self._requests.map if self._requests else map)(self.stream.pick, positions))

    def want(self, sample: int) -> None:
        """Have the cache bring what is read from `sample` on."""
        if self.cache:
            wanted = self.stream.ahead(sample, self._lanes)
            if wanted != self._wanted:
                self._wanted = wanted
                self.cache.want(wanted)

    def close(self) -> None:
        """Stop the threads that fetch."""
        if self._requests:
            self._requests.shutdown(wait=True, cancel_futures=True)
        if self.cache:
            self.cache.close()
            self.dataset.cache = None

    def _open_cache(self) -> Cache | None:
        """The node's, if there is to be one and something to keep there."""
        cache = self.data.cache
        if cache.folder is None or not self.dataset.is_remote:
            return None
        return Cache(Path(cache.folder), int(cache.gb * 1e9), self.dataset.piece)
