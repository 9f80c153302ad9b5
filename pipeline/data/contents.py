"""What a shard holds that no catalog lists: taken from the index beside it, or by walking it."""

import logging
from pathlib import Path

import numpy as np

from pipeline.data import indexes, tars
from pipeline.data.names import escape

_log = logging.getLogger(__name__)


def warn_of_missing_indexes(bare: list[Path], count: int) -> None:
    """Say which of `count` shards will be walked."""
    if bare:
        text = "%d of %d shards have no index and are read whole, beginning with %s (%s)"
        _log.warning(text, len(bare), count, bare[0], indexes.indexing(bare[0]))


def of(shard: Path, wanted: str | None = None) -> tars.Contents:
    """What the index beside a shard says of it, or its own headers; `wanted` as in `tars.Sample`."""
    if indexes.has_index(shard):
        return tars.Contents(indexes.read_index(shard, wanted), [])
    contents = tars.scan(shard, wanted)
    for name, why in contents.passed_over[:1]:
        text = "%s: %d members are left out, beginning with %s (%s)"
        _log.warning(text, shard, len(contents.passed_over), name, why)
    return contents


def images_and_labels(shard: Path, wanted: str | None = None) -> np.ndarray:
    """Of every sample with an image, int64 `[n, 4]`: offset and bytes of the image, offset and bytes of the label.

    Raises:
        UserError: there is none, or the shard or its index is damaged.
    """
    contents = of(shard, wanted)
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
