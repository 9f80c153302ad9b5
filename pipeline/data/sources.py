"""Where images come from before they are shards: a folder, scikit-learn's digits, a torchvision data set."""

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".jp2",
        ".avif",
        ".tga",
        ".ico",
    ]
)
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")


@dataclass(frozen=True)
class Item:
    """One image to pack. `load` gives the encoded file, or an image that was never one, and its label."""

    name: str
    load: Callable[[], "tuple[bytes | Image.Image, int | None]"]


@dataclass(frozen=True)
class Source:
    """Images by split (`train`, `val`); a source with one split may be divided by `val_fraction`.

    Attributes:
        classes: names by label, None without labels.
        ignored: files that are no images.
    """

    splits: Mapping[str, list[Item]]
    classes: list[str] | None
    val_fraction: float = 0.0
    ignored: list[str] = field(default_factory=list)


def open_source(source: str, download: bool = False) -> Source:
    """Open `sklearn:digits`, `torchvision:CLASS[:ROOT]` (ROOT: `data/torchvision`) or a folder.

    Args:
        download: let torchvision fetch what is not in ROOT.

    Raises:
        UserError: there is no such source, or it holds no images.
    """
    kind, _, rest = source.partition(":")
    if kind == "sklearn":
        return _digits(rest)
    if kind == "torchvision":
        name, _, root = rest.partition(":")
        return _torchvision(name, root or "data/torchvision", download)
    return _folder(Path(source))


def _folder(root: Path) -> Source:
    """Class sub-folders (the first level below `root`) give labels if every image lies in one."""
    if not root.is_dir():
        raise UserError("no such folder", str(root), "name a folder of images, sklearn:digits or torchvision:CLASS")
    images: list[Path] = []
    ignored: list[str] = []
    for folder, subfolders, files in os.walk(root, onerror=_unreadable):
        subfolders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            relative = path.relative_to(root)
            if _looks_like_image(path):
                images.append(relative)
            else:
                ignored.append(str(relative))
    if not images:
        raise UserError("the folder holds no images", str(root), "name a folder with JPEG, PNG or WebP files")
    classes = sorted({path.parts[0] for path in images}) if all(len(path.parts) > 1 for path in images) else None
    number = {name: i for i, name in enumerate(classes or [])}
    items = [_file_item(root, path, number.get(path.parts[0])) for path in images]
    return Source({"train": items}, classes, ignored=ignored)


def _file_item(root: Path, path: Path, label: int | None) -> Item:
    return Item(str(path), lambda: ((root / path).read_bytes(), label))


def _unreadable(error: OSError) -> None:
    raise UserError(f"cannot list the folder: {error.strerror}", str(error.filename), "check its rights") from error


def _looks_like_image(path: Path) -> bool:
    if path.suffix.lower() in _SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            return file.read(8).startswith(_MAGIC)
    except OSError:
        return False


def _digits(name: str) -> Source:
    if name != "digits":
        raise UserError(f"unknown data set {name!r}", f"sklearn:{name}", "sklearn:digits is the embedded one")
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()

    def item(i: int) -> Item:
        pixels = np.rint(digits.images[i] * (255 / 16)).astype(np.uint8)
        return Item(f"digit-{i:04d}", lambda: (Image.fromarray(pixels), int(digits.target[i])))

    items = [item(i) for i in range(len(digits.images))]
    return Source({"train": items}, [str(c) for c in digits.target_names], val_fraction=0.2)


def _torchvision(name: str, root: str, download: bool) -> Source:
    import torchvision.datasets

    constructor = getattr(torchvision.datasets, name, None)
    known = [n for n in torchvision.datasets.__all__ if n not in ("VisionDataset", "DatasetFolder", "ImageFolder")]
    if name not in known or constructor is None:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["CIFAR10"]
        raise UserError(f"torchvision has no data set {name!r}", f"torchvision:{name}", f"try {', '.join(near)}")
    options = inspect.signature(constructor).parameters
    arguments: dict[str, Any] = {"root": root} if "root" in options else {}
    if "download" in options:
        arguments["download"] = download
    where = f"torchvision:{name}"
    datasets = {"train": _open_torchvision(constructor, arguments | _first_split(options), where, root)}
    for extra in _validation_splits(options):
        try:
            datasets["val"] = _open_torchvision(constructor, arguments | extra, where, root)
            break
        except _NoSuchSplitError:
            continue
    _check_classification(datasets["train"], where)
    items = {split: [_torchvision_item(data, split, i) for i in range(len(data))] for split, data in datasets.items()}
    classes = getattr(datasets["train"], "classes", None)
    return Source(items, [str(c) for c in classes] if classes else None)


class _NoSuchSplitError(ValueError):
    pass


def _first_split(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"train": True} if "train" in options else {"split": "train"} if "split" in options else {}


def _validation_splits(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arguments that may stand for the validation part; torchvision names it differently from set to set."""
    if "train" in options:
        return [{"train": False}]
    return [{"split": "val"}, {"split": "test"}] if "split" in options else []


def _open_torchvision(constructor: Any, arguments: dict[str, Any], where: str, root: str) -> Any:
    try:
        return constructor(**arguments)
    except RuntimeError as error:  # torchvision's word for files that are not there
        fix = f"put its files into {root}, name another folder as {where}:ROOT, or add --download"
        raise UserError("the data set's files are missing", where, fix) from error
    except ValueError as error:
        if arguments.get("split") in ("val", "test"):
            raise _NoSuchSplitError from error
        raise UserError(f"torchvision refuses: {error}", where, "choose a data set of labelled images") from error
    except TypeError as error:
        raise UserError(f"torchvision refuses: {error}", where, "choose a data set of labelled images") from error


def _torchvision_item(data: Any, split: str, i: int) -> Item:
    return Item(f"{split}/{i}", lambda: data[i])


def _check_classification(data: Any, where: str) -> None:
    from PIL import Image

    sample = data[0]
    if not (isinstance(sample, tuple) and isinstance(sample[0], Image.Image) and isinstance(sample[1], int)):
        raise UserError("not a data set of labelled images", where, "try CIFAR10, Flowers102 or Food101")
