"""Look at every image of existing shards: are they all sound, and what is in them?"""

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import indexes, tars
from pipeline.data.catalog import CATALOG, Catalog, open_catalog, rows_of, write_pixels
from pipeline.data.decoders import NO_LIMIT, check
from pipeline.data.images import EXTENSIONS, BadImage, inspect
from pipeline.data.labels import CLASSES, LONGEST, class_names, parse_label
from pipeline.data.names import escape
from pipeline.data.packing import in_order
from pipeline.data.patterns import expand_shards
from pipeline.data.progress import progress_bar
from pipeline.data.reader import Dataset
from pipeline.data.reading import REQUESTS
from pipeline.data.remote.address import is_remote
from pipeline.data.shards import MANIFEST
from pipeline.data.values import decode_values, has_values, measure_values, name_of
from pipeline.errors import UserError
from pipeline.files import sha256

_AHEAD = 4  # samples in work per thread
_LOOKED_AT = 1000  # images of a folder whose values are measured
_BY_VALUES = "read only with data.value_range, or with model.in_chans other than 3"
_PERCENTILES = (0, 5, 50, 95, 100)


@dataclass
class ShardVerdict:
    """One shard.

    Attributes:
        problems: a sample's key (empty: the shard itself) with what is wrong.
        left_out: names of members that are in no sample, or not read by every training, with why; nothing is wrong
            with these.
    """

    shard: str
    samples: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Statistics:
    """What shards hold.

    Attributes:
        formats: images by format; unusable ones by reason, with a minus sign in front.
        classes: samples by label; empty without labels.
        bad_labels: samples by what is wrong with their label.
        values: by folder, its images' `catalog.Pixels`; empty where no image is usable.
        not_kept: by folder, why its catalog does not hold them.
        height, width, kilobytes: minimum, 5th, 50th and 95th percentile, maximum over usable images.
    """

    shards: int
    samples: int
    bytes: int
    formats: dict[str, int]
    classes: dict[int, int]
    bad_labels: dict[str, int]
    height: list[float]
    width: list[float]
    kilobytes: list[float]
    values: dict[str, dict[str, Any]]
    not_kept: dict[str, str]


def verify(shards: str | Sequence[str], *, progress: bool = True) -> list[ShardVerdict]:
    """Decode every image in full, and hold index, checksum, keys and labels against the tar.

    Raises:
        UserError: a shard is missing. What is wrong inside shards is in the verdicts.
    """
    verdicts = []
    keys: dict[str, str] = {}
    catalogs: dict[Path, Catalog | None] = {}
    paths = expand_shards(shards)
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar(progress, unit=" images") as bar:
        for shard in paths:
            verdict = ShardVerdict(str(shard))
            verdicts.append(verdict)
            bar.set_description(shard.name, refresh=False)
            try:
                if shard.parent not in catalogs:
                    catalogs[shard.parent] = open_catalog(shard.parent)
                named, listing = class_names(shard), catalogs[shard.parent]
                contents = tars.scan(shard, listing.image if listing else None)
                with open(shard, "rb", buffering=0) as file:
                    _verify(verdict, file.fileno(), contents, listing, named, pool, keys, bar)
            except UserError as error:
                verdict.problems.append(("", error.what))
            except OSError as error:
                verdict.problems.append(("", f"cannot be read: {error.strerror or error}"))
    return verdicts


def _verify(
    verdict: ShardVerdict,
    descriptor: int,
    contents: tars.Contents,
    listing: Catalog | None,
    classes: list[str] | None,
    pool: ThreadPoolExecutor,
    keys: dict[str, str],
    bar: Any,
) -> None:
    """Fill the verdict on an open shard; `keys` are those of all shards so far, with the shard's name."""
    shard, samples = Path(verdict.shard), contents.samples
    found = (*_index_problems(shard, samples), *_catalog_problems(shard, samples, listing), *_manifest_problems(shard))
    verdict.problems += [("", problem) for problem in found]
    for name, why in contents.passed_over:
        lost = Path(name).suffix.lower().removeprefix(".") in EXTENSIONS and not Path(name).name.startswith(".")
        (verdict.problems if lost else verdict.left_out).append((name, why))
    by_values = bool(listing and listing.pixels and not listing.pixels.is_rgb)
    problems_of = partial(_sample_problems, descriptor, classes=classes, by_values=by_values)
    valued: list[tuple[str, str]] = []
    for sample, (problems, values) in in_order(pool, problems_of, samples, _AHEAD * (os.cpu_count() or 1)):
        bar.update()
        if values and not by_values:
            valued.append((escape(sample.key), f"a {values}: {_BY_VALUES}"))
        verdict.samples += sample.image is not None
        if sample.key in keys:
            problems = [*problems, f"the key appears in {keys[sample.key]} as well"]
        keys[sample.key] = shard.name
        verdict.problems += [(escape(sample.key), problem) for problem in problems]
        verdict.left_out += [(escape(member.name), tars.OTHER) for member in sample.others if sample.image]
    # beside images of 8-bit RGB they are lost; by themselves they are meant to be read by their values
    (verdict.problems if len(valued) < verdict.samples else verdict.left_out).extend(valued)
    if not verdict.samples:
        verdict.problems.append(("", "no image"))


def _index_problems(shard: Path, samples: list[tars.Sample]) -> Iterator[str]:
    if not indexes.has_index(shard):
        yield "no index"
        return
    try:
        indexed = indexes.read_index(shard, samples[0].wanted if samples else None)
    except UserError as error:
        yield error.what
        return
    if list(tars.image_places(indexed)) != list(tars.image_places(samples)):
        yield "the index does not list the images of the shard"


def _catalog_problems(shard: Path, samples: list[tars.Sample], listing: Catalog | None) -> Iterator[str]:
    number = listing.number(shard.name) if listing else None
    if listing is None or number is None:
        return
    try:
        listing.require(number, shard.stat().st_size, str(shard))
    except UserError as error:
        yield error.what
        return
    rows = rows_of(shard, samples)
    if rows is None or not np.array_equal(rows, listing.of(number)):
        yield f"{CATALOG} does not list the images and labels of the shard"


def _manifest_problems(shard: Path) -> Iterator[str]:
    """Size and checksum according to the `dataset.json` beside the shard, if it knows the shard."""
    try:
        manifest = json.loads((shard.parent / MANIFEST).read_text(encoding="utf-8"))
        entries = {entry["name"]: entry for split in manifest["shards"].values() for entry in split}
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{MANIFEST} is unreadable"
        return
    entry = entries.get(shard.name)
    if entry is None:
        yield f"not listed in {MANIFEST}"
    elif shard.stat().st_size != entry["bytes"] or sha256(shard) != entry["sha256"]:
        yield f"another checksum than in {MANIFEST}"


def _sample_problems(
    descriptor: int, sample: tars.Sample, classes: list[str] | None, by_values: bool
) -> tuple[list[str], str | None]:
    """What is wrong with a sample, and the format of its image if 8-bit RGB training does not read it."""
    if sample.image is None:
        return [f"no image: {sample.why_no_image}" if sample.images else "no image"], None
    problems = []
    values = None
    try:
        data = os.pread(descriptor, sample.image.size, sample.image.offset)
        values = name_of(data) if has_values(data) else None
        if by_values or values:
            decode_values(data, NO_LIMIT)
        else:
            check(data)
    except BadImage as error:
        problems.append(error.reason)
    except OSError as error:
        problems.append(f"cannot be read: {error.strerror}")
    if sample.label is not None:
        problems += _label_problems(descriptor, sample.label, classes)
    return problems, values


def _label_problems(descriptor: int, member: tars.Member, classes: list[str] | None) -> Iterator[str]:
    try:
        label = parse_label(os.pread(descriptor, min(member.size, LONGEST + 1), member.offset))
        if classes is not None and label >= len(classes):
            yield f"label {label} has no name in {CLASSES}"
    except ValueError as error:
        yield str(error)
    except OSError as error:
        yield f"label cannot be read: {error.strerror}"


def stats(shards: str | Sequence[str], *, progress: bool = True) -> Statistics:
    """Counts, sizes and classes from headers, and what values a part of the images hold.

    The latter are written to the catalog of each folder, for images that are not 8-bit RGB (see `intake`).

    Raises:
        UserError: see `Dataset`.
    """
    dataset = Dataset(shards)
    formats: Counter[str] = Counter()
    classes: Counter[int] = Counter()
    bad_labels: Counter[str] = Counter()
    rows = []
    images = _images(dataset, range(len(dataset)))
    for record, data in enumerate(progress_bar(progress, iterable=images, total=len(dataset), unit=" images")):
        try:
            header = decode_values(data, NO_LIMIT)[1] if has_values(data) else inspect(data, NO_LIMIT)
            formats[name_of(data) if has_values(data) else header.format] += 1
            rows.append((*header.size, len(data) / 1e3))
        except BadImage as error:
            formats[f"-{error.reason}"] += 1
        try:
            label = dataset.label(record)
            if label is not None:
                classes[label] += 1
        except ValueError as error:
            bad_labels[str(error)] += 1
    values, not_kept = _keep_values(dataset)
    height, width, kilobytes = np.percentile(rows, _PERCENTILES, axis=0).T.tolist() if rows else ([], [], [])
    return Statistics(
        shards=len(dataset.paths),
        samples=len(dataset),
        bytes=sum(size for shards in dataset.described() for _, size, _ in shards),
        formats=dict(sorted(formats.items())),
        classes=dict(sorted(classes.items())),
        bad_labels=dict(bad_labels),
        height=height,
        width=width,
        kilobytes=kilobytes,
        values=values,
        not_kept=not_kept,
    )


def _images(dataset: Dataset, records: Sequence[int]) -> Iterator[bytearray]:
    """Images of a data set, many read at once if it is in a store."""
    if not dataset.is_remote:
        yield from map(dataset.image, records)
        return
    with ThreadPoolExecutor(REQUESTS) as pool:
        for some in (records[i : i + REQUESTS] for i in range(0, len(records), REQUESTS)):
            yield from pool.map(dataset.image, some)


def _keep_values(dataset: Dataset) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Statistics of values by folder, and why they are not in its catalog, where they are not."""
    records: dict[str, list[int]] = {}
    firsts = np.concatenate([[0], np.cumsum(dataset.shard_sizes)])
    for path, first, last in zip(dataset.paths, firsts, firsts[1:], strict=False):
        records.setdefault(str(path.parent), []).extend(range(first, last))
    values, not_kept = {}, {}
    for folder, own in records.items():
        step = -(-len(own) // _LOOKED_AT)
        found = measure_values(_images(dataset, own[::step]))
        if found is None:
            continue
        values[folder] = found._asdict()
        if is_remote(folder):
            not_kept[folder] = "it is in a store: run this on a disk, and copy the catalog"
        elif open_catalog(Path(folder)) is None:
            not_kept[folder] = f"there is none: poa shards index {shlex.quote(folder)}/*.tar"
        else:
            try:
                write_pixels(Path(folder), found)
            except OSError as error:
                not_kept[folder] = error.strerror or str(error)
        if found.is_rgb:  # which nobody asks for
            not_kept.pop(folder, None)
    return values, not_kept
