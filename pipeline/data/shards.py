"""Build and index WebDataset shards."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pipeline.data import indexes, tars
from pipeline.data.aside import forget, new_folder
from pipeline.data.catalog import CATALOG, write_catalog
from pipeline.data.items import Item, Source
from pipeline.data.labels import CLASSES
from pipeline.data.names import escape
from pipeline.data.packing import Job, ShardEntry, pack_all
from pipeline.data.philox import Purpose, philox
from pipeline.data.progress import progress_bar
from pipeline.data.sources import open_source
from pipeline.errors import UserError
from pipeline.files import write_atomically

MANIFEST = "dataset.json"
_WAITING = 16  # threads that load images from elsewhere
_WORTH = 2000  # images for which another process is started


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
    values: bool = False,
    processes: int = 1,
    download: bool = False,
    progress: bool = True,
) -> BuildReport:
    """Pack images into `train-NNNNNN.tar` (and `val-NNNNNN.tar`), shuffled, with indexes beside them.

    Files are kept byte for byte if training can read them, else stored anew: what was lossy as JPEG, the rest as PNG.
    The same source, options and library versions give the same bytes. `destination` appears whole or not at all; where
    a build of the same was stopped, its complete shards are not packed again. It also holds `dataset.json`,
    `sources.tsv` (which key came from where) and, with labels, `classes.txt`.

    Args:
        source: see `sources.open_source`.
        per_shard: samples in a shard.
        shorter_side: larger images are shrunk to this many pixels.
        val_fraction: share that becomes `val`; by default 0.2 of the digits, 0 of a folder, torchvision's own split.
        masks: a folder of segmentation masks, each under its image's path but for the suffix; they are packed as
            `KEY.seg.png` (see `mask_files`), and an image without one is left out.
        values: pack PNG, TIFF, numpy files, JPEG and WebP with the depth and channels that they have.
        processes: that pack a shard each, where there is enough to do.
        download: let torchvision fetch its files.
        progress: show a bar on standard error.

    Raises:
        UserError: the source has no usable image, the destination is not empty, or an option makes no sense.
    """
    _check_options(per_shard, shorter_side, seed, val_fraction)
    if values and shorter_side:
        raise UserError("images are kept as they are with --values", "--shorter-side", "leave one of them out")
    options: dict[str, Any] = {"per_shard": per_shard, "shorter_side": shorter_side, "seed": seed}
    options |= {"val_fraction": val_fraction} | ({} if masks is None else {"masks": escape(str(masks))})
    options |= {"values": True} if values else {}
    identity = json.dumps([escape(source), options])
    with new_folder(destination, identity) as folder:
        opened = open_source(source, download, None if masks is None else str(masks), values, folder)
        splits = _split_and_shuffle(opened, val_fraction, seed)
        _forget_other_images(folder, splits)
        report = BuildReport(escape(source), options, classes=opened.classes, ignored=opened.ignored)
        report.no_labels = opened.no_labels
        _pack(splits, folder, report, processes if opened.divisible else 1, _WAITING if opened.waits else 1, progress)
        if not report.samples["train"]:
            count = len(splits["train"])
            raise UserError(f"none of {count} images can be decoded", escape(source), _why_none(report))
        if report.classes:
            write_atomically(folder / CLASSES, "".join(f"{name}\n" for name in report.classes))
        write_catalog(folder, [folder / entry.name for entries in report.shards.values() for entry in entries])
        write_atomically(folder / MANIFEST, json.dumps(asdict(report), indent=1) + "\n")
    return report


def _forget_other_images(folder: Path, splits: dict[str, list[Item]]) -> None:
    """Keep what a stopped build completed only if the same images stand in the same order."""
    digest = blake2b()
    for split, items in splits.items():
        for item in items:
            digest.update(f"{split} {item.name}\n".encode())
    there = folder / ".images"
    if there.exists() and there.read_text() != digest.hexdigest():
        for path in (*folder.glob(".*.json"), *folder.glob("*.tar"), *folder.glob("*.idx")):
            path.unlink()
    there.write_text(digest.hexdigest())


def _pack(
    splits: dict[str, list[Item]], folder: Path, report: BuildReport, processes: int, least: int, progress: bool
) -> None:
    """Pack all shards, and gather what came of them; at least `least` threads load images."""
    total = sum(map(len, splits.values()))
    per_shard = report.options["per_shard"]
    processes = min(processes, sum(-(-len(items) // per_shard) for items in splits.values()), total // _WORTH + 1)
    threads = max((os.cpu_count() or 1) // processes, least)
    with (
        progress_bar(progress, total=total, desc="packing", unit=" images") as bar,
        open(folder / "sources.tsv", "w", encoding="utf-8") as names,
    ):
        for split, items in splits.items():
            entries: list[ShardEntry] = []
            jobs = (
                Job(
                    folder / f"{split}-{first // per_shard:06d}.tar",
                    split,
                    first,
                    items[first : first + per_shard],
                    report.options["shorter_side"],
                    report.options.get("values", False),
                    threads,
                )
                for first in range(0, len(items), per_shard)
            )
            for packed in pack_all(jobs, processes, bar.update):
                names.writelines(f"{key}\t{name}\n" for key, name in packed.sources)
                report.left_out += packed.left_out
                if packed.entry:
                    entries.append(packed.entry)
            report.shards[split] = entries
            report.samples[split] = sum(entry.samples for entry in entries)
    forget(folder)
    for split, entries in report.shards.items():
        report.shards[split] = [_renumbered(folder, split, i, entry) for i, entry in enumerate(entries)]


def _renumbered(folder: Path, split: str, number: int, entry: ShardEntry) -> ShardEntry:
    """Close the gap that a shard without a usable image leaves."""
    name = f"{split}-{number:06d}.tar"
    if name != entry.name:
        for place in (Path, indexes.index_path):
            os.replace(place(folder / entry.name), place(folder / name))
    return replace(entry, name=name)


def _why_none(report: BuildReport) -> str:
    """The reasons, the most frequent first."""
    reasons = Counter(reason for _, reason in report.left_out).most_common()
    return f"name other images ({', '.join(f'{count} {reason}' for reason, count in reasons)})"


def index(shards: str | Sequence[str], image: str | None = None) -> list[IndexReport]:
    """Write the index beside each shard, and the catalog of each folder; samples without an image are left out.

    A tar without any member, as some writers leave one at their end, is listed in the catalog as holding nothing.

    Args:
        image: see `write_catalog`.

    Raises:
        UserError: a shard is missing or damaged, has members but no image, or its folder cannot be written.
    """
    from pipeline.data.patterns import expand_shards  # and with it pydantic, which takes half the time of a small build

    paths = expand_shards(shards)
    reports = [_index(path, image) for path in paths]
    for folder in dict.fromkeys(path.parent for path in paths):
        try:
            write_catalog(folder, [path for path in paths if path.parent == folder], image)
        except OSError as error:
            where = str(folder / CATALOG)
            raise UserError(f"cannot write the catalog: {error.strerror}", where, "check rights and space") from error
    return reports


def _index(shard: Path, image: str | None = None) -> IndexReport:
    contents = tars.scan(shard, image)
    complete = [sample for sample in contents.samples if sample.image]
    if not any(contents):
        return IndexReport(str(shard), 0, 0, [])
    if not complete:
        raise tars.no_image(shard, contents)
    try:
        indexes.write_index(shard, [sample for sample in contents.samples if sample.images])
    except OSError as error:
        where = str(indexes.index_path(shard))
        raise UserError(f"cannot write the index: {error.strerror}", where, "check rights and space") from error
    bare = [(escape(sample.key), sample.why_no_image) for sample in contents.samples if not sample.image]
    others = [(escape(member.name), tars.OTHER) for sample in complete for member in sample.others]
    return IndexReport(str(shard), len(complete), len(bare), bare + others + contents.passed_over)


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
