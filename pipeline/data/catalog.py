"""The catalog of a set of shards: `shards.json` and, memory-mapped, `rows.npy`, in place of one index for each shard.

A sample takes 12 bytes of `rows.npy`: block of the image, its bytes, the label. All processes of a node share these
pages, and opening costs the same for ten samples and for a billion. What the catalog says of a shard is believed only
if it fits: the bytes of the shard and a checksum of its rows are compared when the shard is first opened.
"""

import io
import json
import logging
import os
import shlex
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from pipeline.data import indexes, tars
from pipeline.data.labels import BEYOND, LONGEST, NO_NUMBER, class_names, parse_label
from pipeline.data.tars import BLOCK, Sample
from pipeline.errors import UserError
from pipeline.files import one_at_a_time, put_in_place, write_atomically

_log = logging.getLogger(__name__)

CATALOG = "shards.json"
ROWS = "rows.npy"
_FORMAT = 1
_COLUMNS = ("names", "bytes", "samples", "checksums")
_HEADER = 128  # bytes of a .npy file before its numbers
_ROW = np.dtype("<u4")
_NO_LABEL = 2**32 - 1
_FAULTS = {NO_NUMBER: 2**32 - 2, BEYOND: 2**32 - 3}  # of a label file, by what `parse_label` says
_LEAST_STD = 1e-3  # of a channel that is the same everywhere
_MOST = 2**32 - 4  # the largest label that a row holds


class Pixels(NamedTuple):
    """What values the images of some shards hold, each image counting alike.

    Attributes:
        images: that were looked at.
        depth: `integers`, all whole and none below 0, or `floats`.
        low, high: the range of all but the most extreme values.
        mean, std: by channel, of the values as stored.
    """

    images: int
    depth: str
    low: float
    high: float
    mean: list[float]
    std: list[float]

    @classmethod
    def joined(cls, parts: Sequence["Pixels"]) -> "Pixels":
        """Of several sets of shards, each counting by its images."""
        weights = np.array([part.images for part in parts]) / sum(part.images for part in parts)
        means, stds = (np.array([part[i] for part in parts]) for i in (4, 5))
        mean = weights @ means
        std = np.sqrt(weights @ (stds**2 + (means - mean) ** 2))
        depth = "integers" if all(part.depth == "integers" for part in parts) else "floats"
        low, high = min(part.low for part in parts), max(part.high for part in parts)
        return cls(sum(part.images for part in parts), depth, low, high, mean.tolist(), std.tolist())

    @property
    def is_rgb(self) -> bool:
        """Whether these are what 8-bit RGB images hold."""
        return self.depth == "integers" and self.high <= 255 and len(self.mean) == 3

    def range(self) -> tuple[float, float]:
        """What becomes 0 and 1: of integers 0 and the most that as many bits hold, 8 or more."""
        if self.depth == "integers":
            return 0.0, float(2 ** max(int(self.high).bit_length(), 8) - 1)
        return (self.low, self.high) if self.high > self.low else (self.low, self.low + 1.0)

    def scaled(self, value_range: tuple[float, float] | None) -> dict[str, tuple[float, ...]]:
        """`value_range`, `mean` and `std` of an experiment, the latter two of values in 0..1."""
        low, high = value_range or self.range()
        mean = tuple((m - low) / (high - low) for m in self.mean)
        std = tuple(max(s / (high - low), _LEAST_STD) for s in self.std)
        return {"value_range": (low, high), "mean": mean, "std": std}


class Catalog:
    """What the shards of one folder hold.

    Attributes:
        names: of the shards.
        sizes: their bytes.
        samples: of each.
        firsts: the row at which each begins.
        versions: of the objects in a store, by which a change is noticed; None on a disk.
        classes: names by label; None without.
        image: which of a sample's images the rows list (see `tars.Sample`).
        pixels: statistics of the images' values, if `poa shards stats` has seen these very shards.
        rows: uint32 `[samples, 3]`: block of the image, its bytes, its label.
    """

    def __init__(self, content: bytes, rows: Path, where: str) -> None:
        """Read `shards.json` and map `rows.npy`.

        Raises:
            UserError: they are malformed, or do not belong together.
        """
        self.where = where
        try:
            columns = json.loads(content)
            if columns["format"] != _FORMAT:
                raise ValueError(f"format {columns['format']}, expected {_FORMAT}")
            self.names: list[str] = columns["names"]
            self.sizes, self.samples, self._checksums = (np.array(columns[c], np.int64) for c in _COLUMNS[1:])
            self.versions: list[str] | None = columns.get("versions")
            self.classes: list[str] | None = columns["classes"]
            self.image: str | None = columns.get("image")
            self.pixels = Pixels(**columns["pixels"]) if columns.get("pixels") else None
            self.firsts = np.concatenate([[0], np.cumsum(self.samples)])
            if not len(self.names) == len(self.sizes) == len(self.samples) == len(self._checksums):
                raise ValueError("columns of different lengths")
            # a plain array over the map: the class numpy.memmap makes each look-up ten times dearer
            self.rows = np.asarray(np.load(rows, mmap_mode="r"))
            if self.rows.dtype != _ROW or self.rows.shape != (self.firsts[-1], 3):
                raise ValueError(f"{ROWS} holds other samples")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"not a catalog of shards: {error}", where, "poa shards index ...") from error
        except OSError as error:
            raise UserError(f"cannot read {rows.name}: {error.strerror}", where, "poa shards index ...") from error
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def number(self, name: str) -> int | None:
        """The place of a shard among `names`; None if it is not listed."""
        return self._numbers.get(name)

    def of(self, number: int) -> np.ndarray:
        """The rows of a shard."""
        return self.rows[self.firsts[number] : self.firsts[number + 1]]

    def is_sound(self, number: int) -> bool:
        """Whether the rows of a shard are those that were written."""
        return zlib.crc32(self.of(number).data) == self._checksums[number]

    def lists(self, columns: dict[str, list[Any]], image: str | None) -> bool:
        """Whether another catalog's columns are of the same shards, in which the same images lie at the same places."""
        numbers = zip(_COLUMNS[1:], (self.sizes, self.samples, self._checksums), strict=True)
        same = self.names == columns[_COLUMNS[0]] and all(own.tolist() == columns[column] for column, own in numbers)
        return same and self.image == image

    def require(self, number: int, size: int, shard: str) -> None:
        """Refuse a shard of other bytes than the catalog says, and rows that are not those it was written with.

        Raises:
            UserError: the two do not fit.
        """
        fix = f"poa shards index {shlex.quote(shard)}"
        if size != self.sizes[number]:
            raise UserError(f"the shard has {size} bytes and {CATALOG} says {self.sizes[number]}", shard, fix)
        if not self.is_sound(number):
            raise UserError(f"{ROWS} is damaged, or belongs to another {CATALOG}", shard, fix)


def place(row: np.ndarray) -> tuple[int, int]:
    """Offset and bytes of the image."""
    return int(row[0]) * BLOCK, int(row[1])


def extent(rows: np.ndarray) -> tuple[int, int]:
    """Where the first image of some rows begins, and the last one ends."""
    offsets = rows[:, 0].astype(np.int64) * BLOCK
    return int(np.min(offsets)), int(np.max(offsets + rows[:, 1]))


def label(row: np.ndarray) -> int | None:
    """The class index, None without one.

    Raises:
        ValueError: as `parse_label` said.
    """
    value = int(row[2])
    if value == _NO_LABEL:
        return None
    for problem, code in _FAULTS.items():
        if value == code:
            raise ValueError(problem)
    return value


def open_catalog(folder: Path) -> Catalog | None:
    """The catalog of a folder; None without one.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / CATALOG
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read the catalog: {error.strerror}", str(path), "check its rights") from error
    return Catalog(content, folder / ROWS, str(path))


def rows_of(shard: Path, samples: Iterable[Sample]) -> np.ndarray | None:
    """The rows of the samples with an image, uint32 `[n, 3]`; None if an image or a label is too large for one.

    Raises:
        OSError: the shard cannot be read.
    """
    rows = []
    with open(shard, "rb", buffering=0) as file:
        for sample in samples:
            if sample.image:
                value = _label(file.fileno(), sample)
                if value is None or sample.image.size >= 1 << 32:
                    return None
                rows.append((sample.image.offset // BLOCK, sample.image.size, value))
    return np.array(rows, _ROW).reshape(-1, 3)


def _label(descriptor: int, sample: Sample) -> int | None:
    """As a row holds it."""
    member = sample.label
    if member is None:
        return _NO_LABEL
    try:
        value = parse_label(os.pread(descriptor, min(member.size, LONGEST + 1), member.offset))
    except ValueError as error:
        return _FAULTS[str(error)]
    return value if value <= _MOST else None


def write_catalog(folder: Path, shards: Sequence[Path], image: str | None = None) -> None:
    """Write the catalog of a folder, atomically; shards that an older one lists stay in it as long as they are there.

    Statistics that an older one holds stay in it if all shards are as they were, else they are dropped aloud.

    Args:
        folder: of all the shards.
        shards: with their indexes beside them. One with a label too large for a row is left to its index.
        image: which of a sample's images is listed, as `tars.Sample` has it; for all shards of the folder, and until
            another is named.

    Raises:
        UserError: a shard or an index cannot be read.
        OSError: the catalog cannot be written; an older one is still there then.
    """
    with one_at_a_time(folder):
        _write_catalog(folder, shards, image)


def _write_catalog(folder: Path, shards: Sequence[Path], image: str | None) -> None:
    old = None
    with suppress(UserError):  # one that cannot be used is what this one replaces
        old = open_catalog(folder)
    new = {shard.name: shard for shard in shards}
    if old and image not in (None, old.image):
        new |= {name: folder / name for name in old.names if (folder / name).exists()}
    image = image or (old.image if old else None)
    kept = [name for name in old.names if name not in new and (folder / name).exists()] if old else []
    columns: dict[str, list[Any]] = {column: [] for column in _COLUMNS}
    with put_in_place(folder / ROWS) as aside, open(aside, "wb") as file:
        file.write(bytes(_HEADER))
        for name in sorted([*kept, *new]):
            if name in new:
                shard = new[name]
                samples = [] if tars.is_empty(shard) else indexes.read_index(shard, image)
                rows, size = rows_of(shard, samples), shard.stat().st_size
            else:
                assert old is not None
                number = old.number(name)
                assert number is not None
                rows = old.of(number) if old.is_sound(number) else None
                size = int(old.sizes[number])
            if rows is None:
                continue
            file.write(rows.tobytes())
            for column, value in zip(_COLUMNS, (name, size, len(rows), zlib.crc32(rows.data)), strict=True):
                columns[column].append(value)
        _write_header(file, sum(columns["samples"]))
    classes = class_names(folder / "any")
    tree: dict[str, Any] = {"format": _FORMAT, **columns, "classes": classes} | ({"image": image} if image else {})
    if old and old.pixels and old.lists(columns, image):
        tree["pixels"] = old.pixels._asdict()
    elif old and old.pixels and not old.pixels.is_rgb:  # of 8-bit RGB nobody asks for them
        _log.warning("%s: the statistics were of other shards and are dropped (%s)", folder, measuring(folder))
    write_atomically(folder / CATALOG, json.dumps(tree, separators=(",", ":")) + "\n")


def measuring(folder: str | Path) -> str:
    """The command that writes the statistics of a folder's shards."""
    return f"poa shards stats {shlex.quote(str(folder))}/*.tar"


def write_pixels(folder: Path, pixels: Pixels) -> None:
    """Add statistics to the catalog of a folder, until other shards are in it.

    Raises:
        OSError: it cannot be written.
    """
    with one_at_a_time(folder):
        tree = json.loads((folder / CATALOG).read_bytes()) | {"pixels": pixels._asdict()}
        write_atomically(folder / CATALOG, json.dumps(tree, separators=(",", ":")) + "\n")


def _write_header(file: IO[bytes], samples: int) -> None:
    """What numpy writes before the numbers of an array of that many rows."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u4", "fortran_order": False, "shape": (samples, 3)})
    assert header.tell() == _HEADER
    file.seek(0)
    file.write(header.getvalue())
