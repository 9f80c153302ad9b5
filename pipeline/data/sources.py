"""Where images come from before they are shards: a folder, archives, scikit-learn's digits, torchvision."""

import difflib
import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.archives import is_archive, open_archives
from pipeline.data.folder import open_folder
from pipeline.data.images import BadImage
from pipeline.data.items import Item, Source
from pipeline.data.names import escape
from pipeline.errors import UserError, short


def open_source(
    source: str, download: bool = False, masks: str | None = None, values: bool = False, spool: Path | None = None
) -> Source:
    """Open `sklearn:digits`, `torchvision:CLASS[:ROOT]` (ROOT: `data/torchvision`), archives or a folder.

    Args:
        download: let torchvision fetch what is not in ROOT.
        masks, values: see `folder.open_folder`.
        spool: see `archives.open_archives`.

    Raises:
        UserError: there is no such source, or it holds no images.
    """
    kind, _, rest = source.partition(":")
    if masks is not None and kind in ("sklearn", "torchvision"):
        raise UserError("masks belong to a folder of images", "--masks", f"leave it out for {source}")
    if kind == "sklearn":
        return _digits(rest)
    if kind == "torchvision":
        name, _, root = rest.partition(":")
        return _torchvision(name, root or "data/torchvision", download)
    if is_archive(source) and masks is None and spool is not None:
        return open_archives(source, spool)
    if "://" in source:
        raise UserError("a remote address, but images are read from local files", source, "copy them to a disk")
    return open_folder(Path(source), None if masks is None else Path(masks), values)


def _digits(name: str) -> Source:
    if name != "digits":
        raise UserError(f"unknown data set {short(name)}", f"sklearn:{name}", "sklearn:digits is the embedded one")
    from sklearn.datasets import load_digits

    digits = load_digits()

    def item(i: int) -> Item:
        pixels = np.rint(digits.images[i] * (255 / 16)).astype(np.uint8)
        return Item(f"digit-{i:04d}", partial(_digit, pixels, int(digits.target[i])))

    items = [item(i) for i in range(len(digits.images))]
    return Source({"train": items}, [str(c) for c in digits.target_names], val_fraction=0.2)


def _digit(pixels: np.ndarray, label: int) -> Any:
    from PIL import Image

    return Image.fromarray(pixels), label


def _torchvision(name: str, root: str, download: bool) -> Source:
    import torchvision.datasets
    from PIL import EpsImagePlugin

    EpsImagePlugin.gs_binary = False  # these data sets open files with Pillow themselves: no Ghostscript for any
    constructor = getattr(torchvision.datasets, name, None)
    known = [n for n in torchvision.datasets.__all__ if n not in ("VisionDataset", "DatasetFolder", "ImageFolder")]
    if name not in known or constructor is None:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["CIFAR10"]
        raise UserError(f"torchvision has no data set {short(name)}", f"torchvision:{name}", f"try {', '.join(near)}")
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
    return Source(items, [escape(str(c)) for c in classes] if classes else None, divisible=False)


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
    except (TypeError, ImportError) as error:
        raise UserError(f"torchvision refuses: {error}", where, "choose a data set of labelled images") from error
    except OSError as error:  # no network, no rights, no room
        raise UserError(
            f"the data set cannot be opened: {error}", root, "check the network, rights and room"
        ) from error


def _torchvision_item(data: Any, split: str, i: int) -> Item:
    def load() -> Any:
        try:
            image, label = data[i]
        except OSError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged input
            raise BadImage("decode") from error
        if not isinstance(label, int):
            raise BadImage("label")
        return image, label

    return Item(f"{split}/{i}", load)


def _check_classification(data: Any, where: str) -> None:
    from PIL import Image

    if not len(data):
        raise UserError("the data set holds no images", where, "try CIFAR10, Flowers102 or Food101")
    try:
        sample = data[0]
    except Exception:  # a damaged image; packing leaves it out by name
        return
    if not (isinstance(sample, tuple) and isinstance(sample[0], Image.Image) and isinstance(sample[1], int)):
        raise UserError("not a data set of labelled images", where, "try CIFAR10, Flowers102 or Food101")
