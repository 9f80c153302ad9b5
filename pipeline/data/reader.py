"""Samples of shards by their number: where each lies, its bytes, its key and its label."""

import functools
import logging
import os
import shlex
import time
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.config.data import SourceConfig
from pipeline.data import catalog, contents, indexes, tars
from pipeline.data.catalog import Catalog
from pipeline.data.homes import OpenShard, ShardName, catalog_of, open_shard, shard_name
from pipeline.data.labels import LONGEST, parse_label
from pipeline.data.mixing import ROWS, integer_shares
from pipeline.data.names import escape
from pipeline.data.order import cut
from pipeline.data.patterns import Shards, list_shards, require_once
from pipeline.data.remote.address import is_remote
from pipeline.data.remote.cache import Cache, Piece
from pipeline.data.remote.folder import RemoteShard
from pipeline.data.remote.patience import WEATHER
from pipeline.errors import UserError

_log = logging.getLogger(__name__)
_OPEN_FILES = 128


class Source(NamedTuple):
    """A part of the shards with a stream of its own.

    Attributes:
        name: empty if the shards are not divided.
        share: of every `mixing.ROWS` positions.
        first: its first record.
        shard_sizes: samples of each of its shards.
        first_piece: among those of all.
        pieces: records of each of its pieces (see `order`).
    """

    name: str
    share: int
    first: int
    shard_sizes: np.ndarray
    first_piece: int
    pieces: np.ndarray

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
    named = {part.name: list_shards([part]) for part in shards if isinstance(part, SourceConfig)}
    require_once([name for names in named.values() for name in names])
    return named


def _shares(shards: Shards) -> list[int]:
    sources = [] if isinstance(shards, str) else [part for part in shards if isinstance(part, SourceConfig)]
    if not sources:
        return [ROWS]
    return integer_shares([source.weight for source in sources], [source.name for source in sources])


class Dataset:
    """Random access to the samples of shards, by record number; samples without an image are left out.

    What a shard holds is taken from the catalog of its folder, else from the index beside it. One with neither is
    walked, which is slow for large ones and said aloud. A tar without any member, as some writers leave one at their
    end, is left out by name.

    Args:
        shards: patterns, or sources.
        piece_mb: bytes of the pieces that shards are divided into (see `order.cut`).
        image: which image of a sample that has several, as `tars.Sample` has it; by default what the catalog says.

    Attributes:
        sources: that share the stream; a single one without a name, unless they are listed with their names.
        shard_sizes: samples of each shard.
        without_index: shards that had to be walked.
        cache: of the node, if what is remote is kept there.

    Raises:
        UserError: a shard is missing or damaged, all of a source are empty, or an index describes another file.
    """

    def __init__(self, shards: Shards, piece_mb: int = 0, image: str | None = None) -> None:
        self._image = image
        named = _by_source(shards)
        folders = {os.path.dirname(name) for names in named.values() for name in names}
        self._catalogs = {folder: catalog_of(folder) for folder in folders}
        self.without_index: list[Path] = []
        named = {source: self._with_samples(names) for source, names in named.items()}
        self._names = [name for names in named.values() for name in names]
        self._numbers = [self._number(name) for name in self._names]  # in the catalog; -1: not listed
        self._remote = [is_remote(name) for name in self._names]
        self._listing = [self._catalogs[os.path.dirname(name)] for name in self._names]
        unlisted = [self._names[shard] for shard, number in enumerate(self._numbers) if number < 0]
        contents.warn_of_missing_indexes(self.without_index, len(self._names))
        self._rows = {name: contents.images_and_labels(Path(name), self.wanted(name)) for name in unlisted}
        self.shard_sizes = np.array([len(self._rows_of(shard)) for shard in range(len(self._names))])
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self.sources = self._divide(named, _shares(shards), piece_mb)
        self._firsts = [source.first for source in self.sources]
        self._piece_starts = np.concatenate([[0], np.cumsum(np.concatenate([part.pieces for part in self.sources]))])
        self.cache: Cache | None = None
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

    @property
    def remote_bytes(self) -> int:
        """Of the shards that are in a store."""
        return sum(self._bytes(shard) for shard, remote in enumerate(self._remote) if remote)

    @property
    def largest_piece(self) -> int:
        """Bytes of the largest piece, if all samples of a shard are alike."""
        sizes = np.array([self._bytes(shard) for shard in range(len(self._names))]) / self.shard_sizes
        shards = np.searchsorted(self._starts, self._piece_starts[:-1], side="right") - 1
        return int((np.diff(self._piece_starts) * sizes[shards]).max())

    def shard(self, record: int) -> ShardName:
        return shard_name(self._names[self._shard_number(record)])

    def sample(self, record: int) -> int:
        """The number of a record in its shard."""
        return record - int(self._starts[self._shard_number(record)])

    def record(self, shard: str, sample: int) -> int | None:
        """The record of a shard's sample, by the shard's name as `shard` gives it; None if there is none."""
        number = self._by_name.get(shard)
        if number is None or not 0 <= sample < self.shard_sizes[number]:
            return None
        return int(self._starts[number]) + sample

    @functools.cached_property
    def _by_name(self) -> dict[str, int]:
        return {str(shard_name(name)): number for number, name in enumerate(self._names)}

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
            samples = [sample for sample in contents.of(path, self.wanted(str(path))).samples if sample.image]
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
        if self.cache:
            kept = self.cache.read(int(np.searchsorted(self._piece_starts, record, side="right")) - 1, *place)
            WEATHER.looked_up(kept is not None)
            if kept is not None:
                return kept
        began = time.perf_counter()
        data = self._read(shard, *place)
        WEATHER.read(self.source(record).name, len(data), time.perf_counter() - began)
        return data

    def piece(self, number: int) -> Piece | None:
        """What is fetched as one of a shard in a store; None of one on a disk.

        Raises:
            SourceError: the shard cannot be read.
            UserError: it is not the one that its catalog describes.
        """
        first, last = self._piece_starts[number : number + 2]
        shard = self._shard_number(first)
        remote = self._open(shard) if self._remote[shard] else None
        if not isinstance(remote, RemoteShard):
            return None
        begin, end = catalog.extent(self._rows_of(shard)[first - self._starts[shard] : last - self._starts[shard]])
        return Piece(remote, begin, end - begin, self.source(int(first)).name)

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

    def _divide(self, named: dict[str, list[str]], shares: list[int], piece_mb: int) -> list[Source]:
        sources, shard, record, piece = [], 0, 0, 0
        for (name, shards), share in zip(named.items(), shares, strict=True):
            numbers = range(shard, shard + len(shards))
            sizes = self.shard_sizes[numbers.start : numbers.stop]
            pieces = cut([self._bytes(number) for number in numbers], sizes, piece_mb) if piece_mb else sizes
            sources.append(Source(name, share, record, sizes, piece, pieces))
            shard, record, piece = numbers.stop, record + int(sizes.sum()), piece + len(pieces)
        return sources

    def _with_samples(self, names: list[str]) -> list[str]:
        """The shards of a source without those that hold nothing at all."""
        empty = {name for name in names if self._is_empty(name)}
        if empty:
            first = next(name for name in names if name in empty)
            if len(empty) == len(names):
                raise UserError("the shard holds no image", first, "leave it out, or build it again")
            _log.warning("%d of %d shards hold nothing and are left out: %s", len(empty), len(names), first)
        return [name for name in names if name not in empty]

    def _is_empty(self, name: str) -> bool:
        listing, number = self._catalogs[os.path.dirname(name)], self._number(name)
        if listing and number >= 0:
            return not listing.samples[number]
        if indexes.has_index(path := Path(name)):
            return False
        if not (is_empty := tars.is_empty(path)):
            self.without_index.append(path)
        return is_empty

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

    def wanted(self, name: str) -> str | None:
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
