"""Build and index WebDataset shards."""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.data import tars
from pipeline.data.encode import encode
from pipeline.data.images import BadImage
from pipeline.data.philox import Purpose, philox
from pipeline.data.reader import expand_shards
from pipeline.data.sources import Item, Source, open_source
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
        left_out: name and reason of images that cannot be decoded.
        ignored: names of files that are no images.
    """

    source: str
    options: dict[str, Any]
    samples: dict[str, int] = field(default_factory=dict)
    shards: dict[str, list[ShardEntry]] = field(default_factory=dict)
    classes: list[str] | None = None
    left_out: list[tuple[str, str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


@dataclass
class IndexReport:
    shard: str
    samples: int
    without_image: int


def build(
    source: str,
    destination: str | Path,
    *,
    per_shard: int = 1000,
    shorter_side: int | None = None,
    seed: int = 0,
    val_fraction: float | None = None,
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
        download: let torchvision fetch its files.
        progress: show a bar on standard error.

    Raises:
        UserError: the source has no usable image, the destination is not empty, or an option makes no sense.
    """
    _check_options(per_shard, shorter_side, val_fraction)
    target = Path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("the destination is not empty", str(target), "name a new folder, or remove this one")
    opened = open_source(source, download)
    splits = _split_and_shuffle(opened, val_fraction, seed)
    options = {"per_shard": per_shard, "shorter_side": shorter_side, "seed": seed, "val_fraction": val_fraction}
    report = BuildReport(source, options, classes=opened.classes, ignored=opened.ignored)
    aside = _folder_aside(target)
    try:
        _pack(splits, aside, report, progress)
        if not report.samples.get("train"):
            raise UserError(f"none of {len(report.left_out)} images can be decoded", source, "name other images")
        if report.classes:
            write_atomically(aside / "classes.txt", "".join(f"{name}\n" for name in report.classes))
        write_atomically(aside / MANIFEST, json.dumps(asdict(report), indent=1) + "\n")
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def index(shards: str | Sequence[str]) -> list[IndexReport]:
    """Write the index beside each shard; samples without an image are left out of it.

    Raises:
        UserError: a shard is missing, damaged or without any image, or its folder cannot be written.
    """
    return [_index(path) for path in expand_shards(shards)]


def _index(shard: Path) -> IndexReport:
    samples = tars.walk(shard)
    complete = [sample for sample in samples if sample.image]
    if not complete:
        raise UserError("the shard holds no image", str(shard), "leave it out, or build it again")
    try:
        tars.write_index(shard, complete)
    except OSError as error:
        raise UserError(f"cannot write the index: {error.strerror}", str(shard), "check rights and space") from error
    return IndexReport(str(shard), len(complete), len(samples) - len(complete))


def _check_options(per_shard: int, shorter_side: int | None, val_fraction: float | None) -> None:
    if per_shard < 1:
        raise UserError("a shard needs at least one sample", "--per-shard", "give a positive number")
    if shorter_side is not None and shorter_side < 1:
        raise UserError("images need at least one pixel", "--shorter-side", "give a positive number")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise UserError("the share for validation is not within [0, 1)", "--val-fraction", "give e.g. 0.1")


def _folder_aside(target: Path) -> Path:
    where = target.resolve()
    aside = where.with_name(f".{where.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write there: {error.strerror}", str(target), "check rights and space") from error
    return aside


def _split_and_shuffle(source: Source, val_fraction: float | None, seed: int) -> dict[str, list[Item]]:
    generator = philox(seed, Purpose.PACK)
    splits = {
        split: [items[i] for i in generator.permutation(len(items))] for split, items in source.splits.items() if items
    }
    if val_fraction is None and "val" in splits:
        return splits
    images = splits["train"]
    count = round(len(images) * (source.val_fraction if val_fraction is None else val_fraction))
    return {"train": images[count:], "val": images[:count]} if count else {"train": images}


def _pack(splits: dict[str, list[Item]], folder: Path, report: BuildReport, progress: bool) -> None:
    from tqdm import tqdm

    shorter_side = report.options["shorter_side"]
    with (
        tqdm(total=sum(map(len, splits.values())), desc="packing", unit=" images", disable=not progress) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        open(folder / "sources.tsv", "w", encoding="utf-8") as names,
    ):
        for split, items in splits.items():
            writer = _SplitWriter(folder, split, report.options["per_shard"])
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
    except BadImage as error:
        return error.reason
    except OSError as error:
        return error.strerror or "read"
    return {extension: data} if label is None else {extension: data, "cls": str(label).encode()}


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

    def write(self, sample: dict[str, bytes]) -> str:
        """Write one sample and return its key."""
        import webdataset

        if self.samples % self.per_shard == 0:
            self.close()
            # fixed times and owners make the bytes reproducible
            self._tar = webdataset.TarWriter(str(self._path()), user="root", group="root", encoder=False, mtime=0)
        key = f"{self.split}_{self.samples:08d}"
        self._tar.write({"__key__": key, **sample})
        self.samples += 1
        return key

    def close(self) -> list[ShardEntry]:
        """Finish the open shard and return all."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            path = self._path()
            self._entries.append(ShardEntry(path.name, _index(path).samples, path.stat().st_size, sha256(path)))
        return self._entries

    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self._entries):06d}.tar"
