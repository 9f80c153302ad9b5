"""Images of shards with their segmentation masks, both squeezed to a square; a mask's pixel is its class's index."""

import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.eval_images import EvalImages
from pipeline.data.homes import open_shard
from pipeline.data.indexes import has_index, read_index
from pipeline.data.intake import Intake
from pipeline.data.names import escape
from pipeline.data.patterns import Shards
from pipeline.data.tars import walk
from pipeline.errors import UserError

IGNORED = 255
"""A pixel of which nothing is known."""
CLASSES = "seg_classes.txt"
"""Beside the shards, if there is one: names of the masks' classes, the first line that of class 0."""
_MODES = ("L", "P", "1")  # one byte per pixel; of a palette the numbers count


class Masked(NamedTuple):
    """One sample.

    Attributes:
        image: uint8 `[3, S, S]`.
        mask: uint8 `[S, S]`, `IGNORED` or a class; the nearest pixel of the mask.
        largest: the largest class of the mask before it was squeezed, -1 if all of it is ignored.
    """

    image: Tensor
    mask: Tensor
    largest: int


class MaskedImages:
    """The samples of some shards on a disk, each with its mask `KEY.seg.png`.

    Args:
        shards: pattern or patterns.
        preprocessing: what `timm.data.resolve_data_config` says of a model, but for its crop: the whole image is
            squeezed to the input size.
        intake: how bytes become values.

    Attributes:
        side: of image and mask.
        classes: names of the classes; None where no file has them.

    Raises:
        UserError: a shard is missing, damaged or not on a disk, images have no mask, or names of classes differ.
    """

    def __init__(self, shards: Shards, preprocessing: Mapping[str, Any], intake: Intake | None = None):
        whole = {**preprocessing, "crop_pct": 1.0, "crop_mode": "squash"}
        self._images = EvalImages(shards, whole, intake)
        self.dataset, self.normalize = self._images.dataset, self._images.normalize
        self.side = int(preprocessing["input_size"][-1])
        self._places = [place for path in self.dataset.paths for place in _masks_of(path)]
        self.classes = _class_names([path for path in self.dataset.paths if isinstance(path, Path)])
        self._open = functools.lru_cache(16)(lambda name: open_shard(name, None))

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, record: int) -> Masked:
        """Image and mask.

        Raises:
            BadImage: the image cannot be used, for the reason given.
            UserError: the mask cannot.
        """
        image, size = self._images.prepare(self.dataset.image(record))
        mask = self._mask(record, size)
        known = mask[mask != IGNORED]
        rows, columns = (((np.arange(self.side) + 0.5) * length / self.side).astype(int) for length in mask.shape)
        squeezed = np.ascontiguousarray(mask[rows][:, columns])
        return Masked(image, torch.from_numpy(squeezed), int(known.max()) if known.size else -1)

    def _mask(self, record: int, size: tuple[int, int]) -> np.ndarray:
        from PIL import Image

        offset, length = self._places[record]
        try:
            content = self._open(str(self.dataset.shard(record))).read(offset, length)
            mask = Image.open(io.BytesIO(content), formats=("PNG",))
            mode, found = mask.mode, mask.size
            pixels = np.array(mask, dtype=np.uint8) if mode in _MODES else None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise self._refusal(record, "cannot be read as a PNG", "") from error
        if pixels is None:
            raise self._refusal(record, f"is of mode {mode}", ": one byte per pixel is wanted, the index of its class")
        if found != size:
            raise self._refusal(record, f"is {found[0]} x {found[1]} px and its image {size[0]} x {size[1]}", "")
        return pixels

    def _refusal(self, record: int, what: str, more: str) -> UserError:
        key, shard = self.dataset.key(record), str(self.dataset.shard(record))
        return UserError(f"the mask of {key} {what}{more}", shard, "mend the mask and build the shards again")


def _masks_of(path: Any) -> list[tuple[int, int]]:
    """Where the mask of each image of a shard lies."""
    if not isinstance(path, Path):
        raise UserError("masks are read from a disk, and this is in a store", str(path), "copy the shards to a disk")
    samples = [sample for sample in (read_index(path) if has_index(path) else walk(path)) if sample.image]
    bare = [sample for sample in samples if not sample.mask]
    if bare:
        what = f"{len(bare)} of {len(samples)} images have no mask, beginning with {escape(bare[0].key)}"
        raise UserError(what, str(path), "name shards with a KEY.seg.png for every image")
    return [(sample.mask.offset, sample.mask.size) for sample in samples if sample.mask]


def _class_names(paths: list[Path]) -> list[str] | None:
    names: dict[Path, list[str] | None] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        try:
            names[folder] = (folder / CLASSES).read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            names[folder] = None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("cannot read the class names", str(folder / CLASSES), "make it a text file") from error
    lists = {folder: [line.strip() for line in lines] for folder, lines in names.items() if lines}
    for lines in lists.values():
        while lines and not lines[-1]:
            lines.pop()
    first = next(iter(lists.values()), None)
    for folder, own in lists.items():
        require_same_classes(first or [], own, folder / CLASSES)
    return first


def require_same_classes(expected: list[str], found: list[str], where: Path) -> None:
    """A class is a number in the masks, so that names must agree in their order too.

    Raises:
        UserError: they do not; the message names the first difference.
    """
    for number, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            what = f"class {number} is {escape(b)} here and {escape(a)} in the first training shards"
            raise UserError(what, str(where), "number the classes of all masks alike")
    if len(expected) != len(found):
        what = f"{len(found)} classes here and {len(expected)} in the first training shards"
        raise UserError(what, str(where), "number the classes of all masks alike")
