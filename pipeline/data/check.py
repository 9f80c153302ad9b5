"""Look at every image of existing shards: are they all sound, and what is in them?"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.data import tars
from pipeline.data.encode import readable_format
from pipeline.data.images import BadImage, decode, inspect
from pipeline.data.reader import Dataset, expand_shards
from pipeline.data.shards import MANIFEST, in_order
from pipeline.errors import UserError
from pipeline.files import sha256

_PERCENTILES = (0, 5, 50, 95, 100)


@dataclass
class ShardVerdict:
    """One shard; `problems` pairs a sample's key (empty: the shard itself) with what is wrong."""

    shard: str
    samples: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Statistics:
    """What shards hold.

    Attributes:
        formats: images by format; unusable ones by reason, with a minus sign in front.
        classes: samples by label; empty without labels.
        height, width, kilobytes: minimum, 5th, 50th and 95th percentile, maximum over usable images.
    """

    shards: int
    samples: int
    bytes: int
    formats: dict[str, int]
    classes: dict[int, int]
    height: list[float]
    width: list[float]
    kilobytes: list[float]


def verify(shards: str | Sequence[str], *, progress: bool = True) -> list[ShardVerdict]:
    """Decode every image in full, and hold index, checksum, keys and labels against the tar.

    Raises:
        UserError: a shard is missing. What is wrong inside shards is in the verdicts.
    """
    from tqdm import tqdm

    verdicts = []
    keys: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(unit=" images", disable=not progress) as bar:
        for shard in expand_shards(shards):
            verdict = ShardVerdict(str(shard))
            verdicts.append(verdict)
            bar.set_description(shard.name)
            try:
                samples = tars.walk(shard)
            except UserError as error:
                verdict.problems.append(("", error.what))
                continue
            verdict.problems += [
                ("", problem) for problem in (*_index_problems(shard, samples), *_manifest_problems(shard))
            ]
            with open(shard, "rb", buffering=0) as file:
                descriptor = file.fileno()
                for sample, problems in in_order(pool, lambda s, d=descriptor: _sample_problems(d, s), samples):  # type: ignore[misc]
                    bar.update()
                    verdict.samples += sample.image is not None
                    if sample.key in keys:
                        problems = [*problems, f"the key appears in {keys[sample.key]} as well"]
                    keys[sample.key] = shard.name
                    verdict.problems += [(sample.key, problem) for problem in problems]
            if not verdict.samples:
                verdict.problems.append(("", "no image"))
    return verdicts


def _index_problems(shard: Path, samples: list[tars.Sample]) -> Iterator[str]:
    if not tars.index_path(shard).exists():
        yield "no index"
        return
    try:
        indexed = tars.read_index(shard)
    except UserError as error:
        yield error.what
        return
    if tars.image_places(indexed) != tars.image_places(samples):
        yield "the index does not list the images of the shard"


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


def _sample_problems(descriptor: int, sample: tars.Sample) -> list[str]:
    problems = []
    if sample.image is None:
        return ["no image"]
    data = os.pread(descriptor, sample.image.size, sample.image.offset)
    try:
        inspect(data, max_pixels=1 << 62)
        decode(data)
        if readable_format(data) is None:
            problems.append("decode")
    except BadImage as error:
        problems.append(error.reason)
    if sample.label is not None:
        label = os.pread(descriptor, sample.label.size, sample.label.offset)
        if not label.strip().isdigit():
            problems.append("label is no number")
    extensions = Counter(member.extension for member in sample.members)
    return problems + [f"two .{extension} files" for extension, count in extensions.items() if count > 1]


def stats(shards: str | Sequence[str]) -> Statistics:
    """Counts, sizes and classes, from headers alone.

    Raises:
        UserError: see `Dataset`.
    """
    dataset = Dataset(shards)
    formats: Counter[str] = Counter()
    classes: Counter[int] = Counter()
    rows = []
    for record in range(len(dataset)):
        data = dataset.image(record)
        try:
            header = inspect(data, max_pixels=1 << 62)
            formats[header.format] += 1
            rows.append((*header.size, len(data) / 1e3))
        except BadImage as error:
            formats[f"-{error.reason}"] += 1
        label = dataset.label(record)
        if label is not None:
            classes[label] += 1
    height, width, kilobytes = np.percentile(rows, _PERCENTILES, axis=0).T.tolist() if rows else ([], [], [])
    return Statistics(
        shards=len(dataset.paths),
        samples=len(dataset),
        bytes=sum(path.stat().st_size for path in dataset.paths),
        formats=dict(sorted(formats.items())),
        classes=dict(sorted(classes.items())),
        height=height,
        width=width,
        kilobytes=kilobytes,
    )
