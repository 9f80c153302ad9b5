"""What a source of images hands to the packer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Item:
    """One image to pack. `load` gives the encoded file, or an image that was never one, and its label.

    `others` gives the sample's further files by extension (`seg.png`: its mask, `txt`: its caption). Both raise
    BadImage or OSError where there is nothing to be had, and are pickled where other processes pack. `name` stands on
    one line (`names.escape`).
    """

    name: str
    load: Callable[[], "tuple[bytes | Image.Image, int | None]"]
    others: Callable[[], Mapping[str, bytes]] = dict


@dataclass(frozen=True)
class Source:
    """Images by split (`train`, `val`); a source with one split may be divided by `val_fraction`.

    Attributes:
        classes: names by label, None without labels.
        ignored: files that are no images, hidden ones, folders that were not entered, labels that are no numbers.
        no_labels: why folders are no classes, if they are not.
        divisible: whether its images may be loaded by other processes.
        waits: whether loading one is mostly waiting, so that many may be loaded at once.
    """

    splits: Mapping[str, list[Item]]
    classes: list[str] | None
    val_fraction: float = 0.0
    ignored: list[str] = field(default_factory=list)
    no_labels: str | None = None
    divisible: bool = True
    waits: bool = False
