"""The stateless sample stream: the sample at a global position is a pure function of (seed, position)."""

import functools
import logging
import os
import shlex
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.config.data import SourceConfig
from pipeline.data import catalog, indexes, tars
from pipeline.data.catalog import Catalog
from pipeline.data.homes import OpenShard, ShardName, catalog_of, open_shard, shard_name
from pipeline.data.images import BadImage, Header
from pipeline.data.intake import Intake
from pipeline.data.labels import LONGEST, parse_label
from pipeline.data.mixing import ROWS, WHOLE, Mix, Segment, integer_shares
from pipeline.data.names import escape
from pipeline.data.patterns import Shards, list_shards
from pipeline.data.philox import Purpose, philox
from pipeline.data.remote.address import is_remote
from pipeline.data.remote.patience import WEATHER
from pipeline.errors import UserError

_log = logging.getLogger(__name__)
_MAX_SUBSTITUTES = 64
_OPEN_FILES = 128


class Source(NamedTuple):
    """A part of the shards with a stream of its own.

    Attributes:
        name: empty if the shards are not divided.
        share: of every `mixing.ROWS` positions.
        first: its first record.
        shard_sizes: samples of each of its shards.
    """

    name: str
    share: int
    first: int
    shard_sizes: np.ndarray

    @property
    def samples(self) -> int:
        return int(self.shard_sizes.sum())

    @property
    def stream(self) -> int:
        """A number for its random draws, which stays the same beside other sources."""
        return 1 << 32 | zlib.crc32(self.name.encode()) if self.name else 0


def _by_source(shards: Shards) -> dict[str, list[str]]:
    """Names of shards by source."""
    if isinstance(shards, str) or not any(isinstance(part, SourceConfig) for part in shards):
        return {"": list_shards(shards)}
    return {part.name: list_shards(part.url) for part in shards if isinstance(part, SourceConfig)}


def _shares(shards: Shards) -> list[int]:
    sources = [] if isinstance(shards, str) else [part for part in shards if isinstance(part, SourceConfig)]
    if not sources:
        return [ROWS]
    return integer_shares([source.weight for source in sources], [source.name for source in sources])


class Dataset:
    """Random access to the samples of shards, by record number; samples without an image are left out.

    What a shard holds is taken from the catalog of its folder, else from the index beside it. One with neither is
    walked, which is slow for large ones and said aloud.

    Args:
        image: which image of a sample that has several, as `tars.Sample` has it; by default what the catalog says.

    Attributes:
        sources: that share the stream; a single one without a name, unless they are listed with their names.
        shard_sizes: samples of each shard.
        without_index: shards that had to be walked.

    Raises:
        UserError: a shard is missing, damaged or empty, or an index describes another file.
    """

    def __init__(self, shards: Shards, image: str | None = None) -> None:
        self._image = image
        named = _by_source(shards)
        self._names = [name for names in named.values() for name in names]
        self._catalogs = {folder: catalog_of(folder) for folder in set(map(os.path.dirname, self._names))}
        self._numbers = [self._number(name) for name in self._names]  # in the catalog; -1: not listed
        self._remote = [is_remote(name) for name in self._names]
        self._listing = [self._catalogs[os.path.dirname(name)] for name in self._names]
        unlisted = [self._names[shard] for shard, number in enumerate(self._numbers) if number < 0]
        self.without_index = [path for path in map(Path, unlisted) if not indexes.has_index(path)]
        _warn_of_missing_indexes(self.without_index, len(self._names))
        self._rows = {name: _images_and_labels(Path(name), self._wanted(name)) for name in unlisted}
        self.shard_sizes = np.array([len(self._rows_of(shard)) for shard in range(len(self._names))])
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        ends = np.cumsum([len(names) for names in named.values()])
        sizes = np.split(self.shard_sizes, ends[:-1])
        shares = _shares(shards)
        firsts = [0, *np.cumsum([part.sum() for part in sizes]).tolist()]
        self._firsts = firsts[:-1]
        self.sources = [Source(*part) for part in zip(named, shares, firsts, sizes, strict=False)]
        self._open = functools.lru_cache(_OPEN_FILES)(self._open_shard)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def paths(self) -> list[ShardName]:
        return [shard_name(name) for name in self._names]

    @property
    def is_remote(self) -> bool:
        """Whether some shards are in a store, where many reads at once cost little more than one."""
        return any(self._remote)

    def shard(self, record: int) -> ShardName:
        return shard_name(self._names[self._shard_number(record)])

    def described(self) -> list[list[tuple[str, int, int]]]:
        """By source, file name, bytes and samples of each shard; those that a catalog lists are not looked at."""
        rows = [
            (os.path.basename(name), self._bytes(shard), int(self.shard_sizes[shard]))
            for shard, name in enumerate(self._names)
        ]
        ends = np.cumsum([len(source.shard_sizes) for source in self.sources]).tolist()
        return [rows[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def key(self, record: int) -> str:
        """The sample's key, on one line; slow, since keys are not kept in memory."""
        shard = self._shard_number(record)
        path = shard_name(self._names[shard])
        if isinstance(path, Path):
            samples = [sample for sample in _contents(path, self._wanted(str(path))).samples if sample.image]
            return escape(samples[record - int(self._starts[shard])].key)
        _, row = self._place(record)
        return escape(tars.key_at(functools.partial(self._read, shard), catalog.place(row)[0]))

    def image(self, record: int) -> bytearray:
        """The encoded image.

        Raises:
            SourceError: the shard cannot be read.
            UserError: it is not the one that its catalog describes.
        """
        shard, row = self._place(record)
        place = catalog.place(row) if self._numbers[shard] >= 0 else row[:2]
        if not self._remote[shard]:
            return self._read(shard, *place)
        began = time.perf_counter()
        data = self._read(shard, *place)
        WEATHER.read(self.source(record).name, len(data), time.perf_counter() - began)
        return data

    def source(self, record: int) -> Source:
        """The source that a record belongs to."""
        return self.sources[bisect_right(self._firsts, record) - 1]

    def label(self, record: int) -> int | None:
        """The class index in the sample's `.cls` file, None without one.

        Raises:
            ValueError: see `parse_label`.
            UserError: as `image`.
        """
        shard, row = self._place(record)
        if self._numbers[shard] >= 0:
            self._open(shard)  # or the catalog may be another's
            return catalog.label(row)
        offset, size = row[2:]
        return parse_label(self._read(shard, offset, min(int(size), LONGEST + 1))) if offset >= 0 else None

    def _number(self, name: str) -> int:
        folder, base = os.path.split(name)
        listing = self._catalogs[folder]
        number = listing.number(base) if listing else None
        if listing is None or number is None:
            return -1
        if self._image in (None, listing.image):
            return number
        if is_remote(name):
            fix = f"poa shards index --image {shlex.quote(str(self._image))} the shards on a disk, and copy the catalog"
            raise UserError(f"the catalog lists {listing.image or 'the first image'} of each sample", folder, fix)
        return -1  # the index has all images

    def _wanted(self, name: str) -> str | None:
        """The image to take from a shard that is not read by its catalog."""
        listing = self._catalogs[os.path.dirname(name)]
        return self._image or (listing.image if listing else None)

    def _listed(self, shard: int) -> tuple[Catalog, int] | None:
        """The catalog that lists a shard, and its number there."""
        listing, number = self._listing[shard], self._numbers[shard]
        return (listing, number) if listing and number >= 0 else None

    def _rows_of(self, shard: int) -> np.ndarray:
        """Of a catalog, or [records, 4]: image offset and size, label offset and size."""
        listed = self._listed(shard)
        return listed[0].of(listed[1]) if listed else self._rows[self._names[shard]]

    def _bytes(self, shard: int) -> int:
        listed = self._listed(shard)
        return int(listed[0].sizes[listed[1]]) if listed else os.stat(self._names[shard]).st_size

    def _shard_number(self, record: int) -> int:
        return int(np.searchsorted(self._starts, record, side="right")) - 1

    def _place(self, record: int) -> tuple[int, np.ndarray]:
        """A record's shard and row."""
        shard = self._shard_number(record)
        return shard, self._rows_of(shard)[record - self._starts[shard]]

    def _open_shard(self, shard: int) -> OpenShard:
        return open_shard(self._names[shard], self._listed(shard))

    def _read(self, shard: int, offset: int, size: int) -> bytearray:
        return self._open(shard).read(int(offset), int(size))


def _warn_of_missing_indexes(bare: list[Path], count: int) -> None:
    if bare:
        text = "%d of %d shards have no index and are read whole, beginning with %s (%s)"
        _log.warning(text, len(bare), count, bare[0], indexes.indexing(bare[0]))


def _contents(shard: Path, wanted: str | None) -> tars.Contents:
    if indexes.has_index(shard):
        return tars.Contents(indexes.read_index(shard, wanted), [])
    contents = tars.scan(shard, wanted)
    for name, why in contents.passed_over[:1]:
        text = "%s: %d members are left out, beginning with %s (%s)"
        _log.warning(text, shard, len(contents.passed_over), name, why)
    return contents


def _images_and_labels(shard: Path, wanted: str | None) -> np.ndarray:
    contents = _contents(shard, wanted)
    places = [(*_member(image), *_member(sample.label)) for sample in contents.samples if (image := sample.image)]
    if not places:
        raise tars.no_image(shard, contents)
    if len(places) < len(contents.samples):
        first = next(sample for sample in contents.samples if not sample.image)
        text = "%s: %d samples have no image and are left out, beginning with %s (%s)"
        _log.warning(text, shard, len(contents.samples) - len(places), escape(first.key), first.why_no_image)
    return np.array(places, dtype=np.int64)


def _member(member: tars.Member | None) -> tuple[int, int]:
    return (member.offset, member.size) if member else (-1, 0)


class SampleOrder:
    """Which record stands at a global position: all once per epoch, in an order of its own for each epoch.

    Shards are permuted, then the samples within windows of consecutive shards, so that reads stay local.
    """

    def __init__(self, shard_sizes: np.ndarray, window: int, seed: int, source: int = 0) -> None:
        self.shard_sizes, self.window, self.seed, self.source = np.asarray(shard_sizes), window, seed, source
        self.samples = int(self.shard_sizes.sum())
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._shards = functools.lru_cache(4)(self._draw_shards)
        self._records = functools.lru_cache(4)(self._draw_records)

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.samples)
        _, starts = self._shards(epoch)
        window = int(np.searchsorted(starts, place, side="right")) - 1
        return int(self._records(epoch, window)[place - starts[window]])

    def _draw_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shard order and the place in the epoch at which each window starts."""
        order = philox(self.seed, Purpose.SHARDS, epoch, source=self.source).permutation(len(self.shard_sizes))
        ends = np.cumsum(self.shard_sizes[order])
        return order, np.concatenate([[0], ends[self.window - 1 : -1 : self.window]])

    def _draw_records(self, epoch: int, window: int) -> np.ndarray:
        order, _ = self._shards(epoch)
        shards = order[window * self.window : (window + 1) * self.window]
        records = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in shards])
        return philox(self.seed, Purpose.SAMPLES, epoch, window, source=self.source).permutation(records)


class Skip(NamedTuple):
    """A sample that was left out: `reason` as in `images.inspect`, or `decode`."""

    key: str
    shard: str
    reason: str
    position: int


class Picked(NamedTuple):
    """What a position is given: a usable image as `Intake.open` has it, and the records rejected on the way to it."""

    record: int
    data: Any
    header: Header
    rejected: tuple[tuple[int, str], ...]


class SampleStream:
    """Usable images by global position.

    A rejected sample is replaced by a record of its source drawn from (seed, position, attempt). Rejection depends on
    the bytes alone: `reject` records a verdict reached later, by decoding, that any other process would reach as well.

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
        unpack: Callable[[bytearray], tuple[Any, Header]] | None = None,
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self._unpack = unpack or Intake(max_pixels=max_pixels).open
        self._mix = Mix([source.share for source in dataset.sources], seed, segment)
        self._orders = [SampleOrder(s.shard_sizes, window, seed, s.stream) for s in dataset.sources]
        self._rejected: dict[int, str] = {}

    def reject(self, record: int, reason: str) -> None:
        self._rejected[record] = reason

    def order(self, position: int) -> int:
        """The record at a position."""
        number, place = self._place(position)
        return self.dataset.sources[number].first + self._orders[number](place)

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
        source = self.dataset.sources[self._place(position)[0]]
        return source.first + int(philox(self.seed, Purpose.SUBSTITUTE, position, attempt).integers(source.samples))

    def _place(self, position: int) -> tuple[int, int]:
        """Source and position in its stream; a single source from the start of the run has the run's positions."""
        if len(self._orders) == 1 and not self._mix.segment.begin:
            return 0, position
        return self._mix(position)
