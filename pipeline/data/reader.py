"""The stateless sample stream: the sample at a global position is a pure function of (seed, position)."""

import functools
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.data import catalog, indexes, tars
from pipeline.data.catalog import Catalog, open_catalog
from pipeline.data.images import BadImage, Header, hide_exif, inspect
from pipeline.data.labels import LONGEST, parse_label
from pipeline.data.names import escape
from pipeline.data.patterns import list_shards
from pipeline.data.philox import Purpose, philox
from pipeline.errors import UserError

_log = logging.getLogger(__name__)
_MAX_SUBSTITUTES = 64
_OPEN_FILES = 128


class _File:
    """An open file that is closed with its last reference, so that a reader may outlive its place in a cache."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Dataset:
    """Random access to the samples of shards, by record number; samples without an image are left out.

    What a shard holds is taken from the catalog of its folder, else from the index beside it. One with neither is
    walked, which is slow for large ones and said aloud.

    Attributes:
        shard_sizes: samples of each shard.
        without_index: shards that had to be walked.

    Raises:
        UserError: a shard is missing, damaged or empty, or an index describes another file.
    """

    def __init__(self, shards: str | Sequence[str]) -> None:
        self._names = list_shards(shards)
        self._catalogs = {folder: open_catalog(Path(folder)) for folder in set(map(os.path.dirname, self._names))}
        self._numbers = np.array([self._number(name) for name in self._names])  # in the catalog; -1: not listed
        self._listing = [self._catalogs[os.path.dirname(name)] for name in self._names]
        unlisted = [self._names[shard] for shard in np.flatnonzero(self._numbers < 0)]
        self.without_index = [path for path in map(Path, unlisted) if not indexes.has_index(path)]
        _warn_of_missing_indexes(self.without_index, len(self._names))
        self._rows = {name: _images_and_labels(Path(name)) for name in unlisted}
        self.shard_sizes = np.array([len(self._rows_of(shard)) for shard in range(len(self._names))])
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._open = functools.lru_cache(_OPEN_FILES)(self._open_shard)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def paths(self) -> list[Path]:
        return [Path(name) for name in self._names]

    def shard(self, record: int) -> Path:
        return Path(self._names[self._shard_number(record)])

    def described(self) -> list[tuple[str, int, int]]:
        """File name, bytes and samples of each shard; those that a catalog lists are not looked at."""
        return [
            (os.path.basename(name), self._bytes(shard), int(self.shard_sizes[shard]))
            for shard, name in enumerate(self._names)
        ]

    def key(self, record: int) -> str:
        """The sample's key, on one line; slow, since keys are not kept in memory."""
        place = record - int(self._starts[self._shard_number(record)])
        return escape([sample for sample in _contents(self.shard(record)).samples if sample.image][place].key)

    def image(self, record: int) -> bytearray:
        """The encoded image.

        Raises:
            OSError: the shard cannot be read.
            UserError: it is not the one that its catalog describes.
        """
        shard, row = self._place(record)
        return self._read(shard, *(catalog.place(row) if self._numbers[shard] >= 0 else row[:2]))

    def label(self, record: int) -> int | None:
        """The class index in the sample's `.cls` file, None without one.

        Raises:
            ValueError: see `parse_label`.
            OSError, UserError: as `image`.
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
        return -1 if number is None else number

    def _listed(self, shard: int) -> tuple[Catalog, int] | None:
        """The catalog that lists a shard, and its number there."""
        listing, number = self._listing[shard], int(self._numbers[shard])
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

    def _open_shard(self, shard: int) -> _File:
        file, listed = _File(Path(self._names[shard])), self._listed(shard)
        if listed:
            listed[0].require(listed[1], os.fstat(file.descriptor).st_size, self._names[shard])
        return file

    def _read(self, shard: int, offset: int, size: int) -> bytearray:
        data = bytearray(int(size))
        if os.preadv(self._open(shard).descriptor, [data], int(offset)) != size:
            raise OSError(f"{self._names[shard]} ends within a sample")
        return data


def _warn_of_missing_indexes(bare: list[Path], count: int) -> None:
    if bare:
        text = "%d of %d shards have no index and are read whole, beginning with %s (%s)"
        _log.warning(text, len(bare), count, bare[0], indexes.indexing(bare[0]))


def _contents(shard: Path) -> tars.Contents:
    if indexes.has_index(shard):
        return tars.Contents(indexes.read_index(shard), [])
    contents = tars.scan(shard)
    for name, why in contents.passed_over[:1]:
        text = "%s: %d members are left out, beginning with %s (%s)"
        _log.warning(text, shard, len(contents.passed_over), name, why)
    return contents


def _images_and_labels(shard: Path) -> np.ndarray:
    contents = _contents(shard)
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

    def __init__(self, shard_sizes: np.ndarray, window: int, seed: int) -> None:
        self.shard_sizes, self.window, self.seed = np.asarray(shard_sizes), window, seed
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
        order = philox(self.seed, Purpose.SHARDS, epoch).permutation(len(self.shard_sizes))
        ends = np.cumsum(self.shard_sizes[order])
        return order, np.concatenate([[0], ends[self.window - 1 : -1 : self.window]])

    def _draw_records(self, epoch: int, window: int) -> np.ndarray:
        order, _ = self._shards(epoch)
        shards = order[window * self.window : (window + 1) * self.window]
        records = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in shards])
        return philox(self.seed, Purpose.SAMPLES, epoch, window).permutation(records)


class Skip(NamedTuple):
    """A sample that was left out: `reason` as in `images.inspect`, or `read` or `decode`."""

    key: str
    shard: str
    reason: str
    position: int


class Picked(NamedTuple):
    """What a position is given: a usable image (EXIF hidden), and the records rejected on the way to it."""

    record: int
    data: bytearray
    header: Header
    rejected: tuple[tuple[int, str], ...]


class SampleStream:
    """Usable images by global position.

    A rejected sample is replaced by a record drawn from (seed, position, attempt). Rejection depends on the bytes
    alone: `reject` records a verdict reached later, by decoding, that any other process would reach as well.
    """

    def __init__(self, dataset: Dataset, *, window: int, seed: int, max_pixels: int) -> None:
        self.dataset, self.seed, self.max_pixels = dataset, seed, max_pixels
        self.order = SampleOrder(dataset.shard_sizes, window, seed)
        self._rejected: dict[int, str] = {}

    def reject(self, record: int, reason: str) -> None:
        self._rejected[record] = reason

    def pick(self, position: int) -> Picked:
        """The image for a position.

        Raises:
            UserError: too many substitutes in a row are unusable.
        """
        rejected: list[tuple[int, str]] = []
        for attempt in range(_MAX_SUBSTITUTES):
            record = self._candidate(position, attempt)
            if record not in self._rejected:
                try:
                    data = self.dataset.image(record)
                    header = inspect(data, self.max_pixels)
                    hide_exif(data, header)
                    return Picked(record, data, header, tuple(rejected))
                except BadImage as error:
                    self.reject(record, error.reason)
                except OSError:
                    self.reject(record, "read")
            rejected.append((record, self._rejected[record]))
        shard = str(self.dataset.shard(rejected[-1][0]))
        raise UserError(
            f"{_MAX_SUBSTITUTES} unusable images in a row", shard, f"poa shards verify {shlex.quote(shard)}"
        )

    def _candidate(self, position: int, attempt: int) -> int:
        if attempt == 0:
            return self.order(position)
        return int(philox(self.seed, Purpose.SUBSTITUTE, position, attempt).integers(len(self.dataset)))
