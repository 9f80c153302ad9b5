"""Build and index WebDataset shards."""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.data import indexes, tars
from pipeline.data.aside import new_folder
from pipeline.data.catalog import CATALOG, write_catalog
from pipeline.data.decoders import NO_LIMIT
from pipeline.data.encode import encode
from pipeline.data.images import BadImage, inspect
from pipeline.data.items import Item, Source
from pipeline.data.labels import CLASSES
from pipeline.data.mask_files import MASK, encode_mask
from pipeline.data.names import escape
from pipeline.data.patterns import expand_shards
from pipeline.data.philox import Purpose, philox
from pipeline.data.progress import progress_bar
from pipeline.data.sources import open_source
from pipeline.errors import UserError
from pipeline.files import sha256, write_atomically

MANIFEST = "dataset.json"
_AHEAD = 4  # images in work per thread

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class ShardEntry:
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass
class BuildReport:
    """What was packed; also the content of `dataset.json`.

    Attributes:
        samples: by split.
        shards: by split.
        classes: names by label, None without labels.
        left_out: name and reason of images that cannot be packed.
        ignored: names of files that are no images, and of hidden ones and folders that were passed over, with why.
        no_labels: why folders were not taken for classes, where some images lie in folders.
    """

    source: str
    options: dict[str, Any]
    samples: dict[str, int] = field(default_factory=dict)
    shards: dict[str, list[ShardEntry]] = field(default_factory=dict)
    classes: list[str] | None = None
    left_out: list[tuple[str, str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    no_labels: str | None = None


@dataclass
class IndexReport:
    """What an index lists.

    Attributes:
        without_image: samples left out.
        left_out: their keys, and names of other members that are in no sample, with the reason.
    """

    shard: str
    samples: int
    without_image: int
    left_out: list[tuple[str, str]] = field(default_factory=list)


def build(
    source: str,
    destination: str | Path,
    *,
    per_shard: int = 1000,
    shorter_side: int | None = None,
    seed: int = 0,
    val_fraction: float | None = None,
    masks: str | Path | None = None,
    download: bool = False,
    progress: bool = True,
) -> BuildReport:
    """Pack images into `train-NNNNNN.tar` (and `val-NNNNNN.tar`), shuffled, with indexes beside them.

    Files are kept byte for byte if training can read them, else stored anew: what was lossy as JPEG, the rest as PNG.
    The same source, options and library versions give the same bytes. `destination` appears whole or not at all; it
    also holds `dataset.json`, `sources.tsv` (which key came from where) and, with labels, `classes.txt`.

    Args:
        source: see `sources.open_source`.
        per_shard: samples in a shard.
        shorter_side: larger images are shrunk to this many pixels.
        val_fraction: share that becomes `val`; by default 0.2 of the digits, 0 of a folder, torchvision's own split.
        masks: a folder of segmentation masks, each under its image's path but for the suffix; they are packed as
            `KEY.seg.png` (see `mask_files`), and an image without one is left out.
        download: let torchvision fetch its files.
        progress: show a bar on standard error.

    Raises:
        UserError: the source has no usable image, the destination is not empty, or an option makes no sense.
    """
    _check_options(per_shard, shorter_side, seed, val_fraction)
    with new_folder(destination) as folder:
        opened = open_source(source, download, None if masks is None else str(masks))
        splits = _split_and_shuffle(opened, val_fraction, seed)
        options: dict[str, Any] = {"per_shard": per_shard, "shorter_side": shorter_side, "seed": seed}
        options |= {"val_fraction": val_fraction} | ({} if masks is None else {"masks": escape(str(masks))})
        report = BuildReport(escape(source), options, classes=opened.classes, ignored=opened.ignored)
        report.no_labels = opened.no_labels
        _pack(splits, folder, report, progress)
        if not report.samples["train"]:
            count = len(splits["train"])
            raise UserError(f"none of {count} images can be decoded", escape(source), _why_none(report))
        if report.classes:
            write_atomically(folder / CLASSES, "".join(f"{name}\n" for name in report.classes))
        write_catalog(folder, [folder / entry.name for entries in report.shards.values() for entry in entries])
        write_atomically(folder / MANIFEST, json.dumps(asdict(report), indent=1) + "\n")
    return report


def _why_none(report: BuildReport) -> str:
    """The reasons, the most frequent first."""
    reasons = Counter(reason for _, reason in report.left_out).most_common()
    return f"name other images ({', '.join(f'{count} {reason}' for reason, count in reasons)})"


def index(shards: str | Sequence[str]) -> list[IndexReport]:
    """Write the index beside each shard, and the catalog of each folder; samples without an image are left out.

    A tar without any member, as some writers leave one at their end, is listed in the catalog as holding nothing.

    Raises:
        UserError: a shard is missing or damaged, has members but no image, or its folder cannot be written.
    """
    paths = expand_shards(shards)
    reports = [_index(path) for path in paths]
    for folder in dict.fromkeys(path.parent for path in paths):
        try:
            write_catalog(folder, [path for path in paths if path.parent == folder])
        except OSError as error:
            where = str(folder / CATALOG)
            raise UserError(f"cannot write the catalog: {error.strerror}", where, "check rights and space") from error
    return reports


def _index(shard: Path) -> IndexReport:
    contents = tars.scan(shard)
    complete = [sample for sample in contents.samples if sample.image]
    if not any(contents):
        return IndexReport(str(shard), 0, 0, [])
    if not complete:
        raise tars.no_image(shard, contents)
    try:
        indexes.write_index(shard, complete)
    except OSError as error:
        where = str(indexes.index_path(shard))
        raise UserError(f"cannot write the index: {error.strerror}", where, "check rights and space") from error
    bare = [(escape(sample.key), sample.why_no_image) for sample in contents.samples if not sample.image]
    return IndexReport(str(shard), len(complete), len(bare), bare + contents.passed_over)


def _check_options(per_shard: int, shorter_side: int | None, seed: int, val_fraction: float | None) -> None:
    if per_shard < 1:
        raise UserError("a shard needs at least one sample", "--per-shard", "give a positive number")
    if shorter_side is not None and shorter_side < 1:
        raise UserError("images need at least one pixel", "--shorter-side", "give a positive number")
    if not 0 <= seed < 1 << 64:
        raise UserError("the seed is not within [0, 2^64)", "--seed", "give e.g. 0")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise UserError("the share for validation is not within [0, 1)", "--val-fraction", "give e.g. 0.1")


def _split_and_shuffle(source: Source, val_fraction: float | None, seed: int) -> dict[str, list[Item]]:
    generator = philox(seed, Purpose.PACK)
    splits = {
        split: [items[i] for i in generator.permutation(len(items))] for split, items in source.splits.items() if items
    }
    if val_fraction is None and "val" in splits:
        return splits
    images = splits["train"]
    wanted = round(len(images) * (source.val_fraction if val_fraction is None else val_fraction))
    count = min(wanted, len(images) - 1)  # something is left to train on
    return {"train": images[count:], "val": images[:count]} if count else {"train": images}


def _pack(splits: dict[str, list[Item]], folder: Path, report: BuildReport, progress: bool) -> None:
    shorter_side = report.options["shorter_side"]
    with (
        progress_bar(progress, total=sum(map(len, splits.values())), desc="packing", unit=" images") as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        open(folder / "sources.tsv", "w", encoding="utf-8") as names,
    ):
        for split, items in splits.items():
            with _SplitWriter(folder, split, report.options["per_shard"]) as writer:
                for item, sample in in_order(pool, lambda item: _sample(item, shorter_side), items):
                    bar.update()
                    if isinstance(sample, str):
                        report.left_out.append((item.name, sample))
                    else:
                        names.write(f"{writer.write(sample)}\t{item.name}\n")
                report.shards[split] = writer.close()
                report.samples[split] = writer.samples


def _sample(item: Item, shorter_side: int | None) -> dict[str, bytes] | str:
    """The sample's files by extension, or why there are none."""
    try:
        content, label = item.load()
        extension, data = encode(content, shorter_side)
        others = dict(item.others())
        if MASK in others:
            rows, cols = inspect(data, NO_LIMIT).size
            others[MASK] = encode_mask(others[MASK], (cols, rows), shorter_side)
    except BadImage as error:
        return error.reason
    except OSError as error:
        return error.strerror or "read"
    return {extension: data, **({} if label is None else {"cls": str(label).encode()}), **others}


def in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Like `map` over the pool's threads, but never far ahead of the consumer."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > _AHEAD * (os.cpu_count() or 1):
            first, result = waiting.popleft()
            yield first, result.result()
    for first, result in waiting:
        yield first, result.result()


class _SplitWriter:
    """Writes samples of a split into consecutive shards; a shard is opened by its first sample."""

    def __init__(self, folder: Path, split: str, per_shard: int) -> None:
        self.folder, self.split, self.per_shard = folder, split, per_shard
        self.samples = 0
        self._entries: list[ShardEntry] = []
        self._tar: Any = None
        self._file: Any = None

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:  # the end of a build that failed: what is in the buffers need not fit the disk
            for part in (self._tar, self._file):
                with suppress(OSError):
                    part.close()

    def write(self, sample: dict[str, bytes]) -> str:
        """Write one sample and return its key."""
        import webdataset

        if self.samples % self.per_shard == 0:
            self.close()
            self._file = open(self._path(), "wb")  # noqa: SIM115  a shard outlives the call
            # fixed times and owners make the bytes reproducible
            self._tar = webdataset.TarWriter(self._file, "root", "root", encoder=False, mtime=0, compress=False)
        key = f"{self.split}_{self.samples:08d}"
        self._tar.write({"__key__": key, **sample})
        self.samples += 1
        return key

    def close(self) -> list[ShardEntry]:
        """Finish the open shard and return all."""
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            self._tar = self._file = None
            path = self._path()
            self._entries.append(ShardEntry(path.name, _index(path).samples, path.stat().st_size, sha256(path)))
        return self._entries

    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self._entries):06d}.tar"
