"""Images in a folder, whose sub-folders may be classes."""

import errno
import os
import stat
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline.data.aside import is_partial
from pipeline.data.items import Item, Source
from pipeline.data.mask_files import MASK, read_mask
from pipeline.data.names import escape
from pipeline.errors import UserError

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
        ".pnm",
        ".pfm",
        ".jp2",
        ".avif",
        ".tga",
        ".ico",
    ]
)
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"RIFF")
_TIFF = (b"II*\0", b"MM\0*")  # also of raw photographs, where the first picture is a thumbnail: not by magic alone
_SYSTEM = frozenset(  # folders that systems leave behind, small pictures of the user's in some of them
    ["__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information", "__pycache__"]
)
_SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing"])


@dataclass
class _Found:
    """Names below the root, in the order of the walk."""

    root: Path
    masks: Path | None = None
    suffixes: frozenset[str] = _SUFFIXES
    images: list[Path] = field(default_factory=list)
    texts: set[Path] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)

    def ignore(self, path: Path, why: str = "") -> None:
        self.ignored.append(escape(str(path.relative_to(self.root))) + (f" ({why})" if why else ""))


def open_folder(root: Path, masks: Path | None = None, values: bool = False) -> Source:
    """Class sub-folders (the first level below `root`) give labels if every image lies in one.

    Links are followed. Hidden files and folders, and those that systems leave behind, are not looked into. A `.txt`
    beside an image of that name is its caption.

    Args:
        masks: a folder with a mask for each image, under the image's own path but for the suffix.
        values: numpy files are images, too.

    Raises:
        UserError: there is no such folder, it cannot be read, holds no images, or holds whole splits.
    """
    if not stat.S_ISDIR(_mode(root)):
        what = "a file, not a folder" if _mode(root) else "no such folder"
        raise UserError(what, str(root), "name a folder of images, sklearn:digits or torchvision:CLASS")
    if masks is not None:
        _require_masks(root, masks)
    found = _Found(root, masks, _SUFFIXES | {".npy"} if values else _SUFFIXES)
    _walk(root, found, ())
    images = found.images
    if not images:
        raise UserError("the folder holds no images", str(root), "name a folder with JPEG, PNG or WebP files")
    _refuse_splits(root, images)
    loose = next((path for path in images if len(path.parts) == 1), None)
    classes = sorted({path.parts[0] for path in images}) if loose is None else None
    number = {name: i for i, name in enumerate(classes or [])}
    captions: dict[Path, Path] = {}
    if found.texts:
        captions = {path: path.with_suffix(".txt") for path in images if path.with_suffix(".txt") in found.texts}
    for text in sorted(found.texts.difference(captions.values())):
        found.ignore(root / text)
    items = [
        _file_item(root, path, number.get(path.parts[0]), masks, root / captions[path] if path in captions else None)
        for path in images
    ]
    no_labels = None
    if loose is not None and any(len(path.parts) > 1 for path in images):
        no_labels = f"{escape(str(loose))} lies in no class folder"
    names = None if classes is None else list(map(escape, classes))
    return Source({"train": items}, names, ignored=found.ignored, no_labels=no_labels)


def _walk(folder: Path, found: _Found, above: tuple[tuple[int, int], ...]) -> None:
    """Take up a folder's files, then its sub-folders, both by name; `above` are the folders on the way to it."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error
    here = (status.st_dev, status.st_ino)
    if here in above:
        found.ignore(folder, "a link back to a folder above")
        return
    count = len(found.images)
    subfolders = []
    for entry in entries:
        path, mode = folder / entry.name, _kind(entry)
        if is_partial(entry.name):
            continue  # shards that are built within the source
        if entry.name.startswith("."):
            found.ignore(path, "hidden")
        elif stat.S_ISDIR(mode):
            subfolders.append(path)
        elif mode and not stat.S_ISREG(mode):  # reading a pipe would wait for ever
            found.ignore(path, "not a regular file")
        elif _looks_like_image(path, found.suffixes):
            found.images.append(path.relative_to(found.root))
        elif mode and path.suffix == ".txt":
            found.texts.add(path.relative_to(found.root))
        else:
            found.ignore(path, "" if mode else "a broken link")
    for path in subfolders:
        if path.name.lower() in _SYSTEM:
            found.ignore(path, "a system's folder")
        elif found.masks is not None and found.masks.samefile(path):
            found.ignore(path, "the masks")
        else:
            _walk(path, found, (*above, here))
    if len(above) == 1 and len(found.images) == count:
        found.ignore(folder, "a folder without images")


def _kind(entry: "os.DirEntry[str]") -> int:
    """The mode, as far as the listing tells it: a question for each file is slow on network file systems."""
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    return stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else _mode(Path(entry.path))


def _mode(path: Path) -> int:
    """Of what a name stands for, links followed; 0 where nothing is."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return 0
        raise _unreadable(path, error) from error


def _refuse_splits(root: Path, images: list[Path]) -> None:
    """`root` holds `train/`, `val/`, ... each with classes of its own: these would become the classes."""
    tops = sorted({path.parts[0] for path in images})
    if all(top.lower() in _SPLITS for top in tops) and all(len(path.parts) > 2 for path in images):
        fix = f"build each by itself, beginning with {root / tops[0]}"
        raise UserError(f"the folders are splits, not classes: {', '.join(tops)}", str(root), fix)


def _require_masks(root: Path, masks: Path) -> None:
    if not stat.S_ISDIR(_mode(masks)):
        raise UserError("no such folder of masks", str(masks), "name the folder that holds them")
    if masks.samefile(root):
        raise UserError("the masks lie among the images", str(masks), "keep them in a folder of their own")


def _file_item(root: Path, path: Path, label: int | None, masks: Path | None, caption: Path | None) -> Item:
    name = str(path)
    return Item(escape(name), partial(_load, os.path.join(root, name), label), partial(_others, path, masks, caption))


def _load(path: str, label: int | None) -> tuple[bytes, int | None]:
    with open(path, "rb", buffering=0) as file:
        return file.read(), label


def _others(path: Path, masks: Path | None, caption: Path | None) -> dict[str, bytes]:
    found = {} if masks is None else {MASK: read_mask(masks, path)}
    return found if caption is None else {**found, "txt": caption.read_bytes()}


def _unreadable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot look there: {error.strerror}", escape(str(folder)), "check its rights")


def _looks_like_image(path: Path, suffixes: frozenset[str]) -> bool:
    suffix = path.suffix.lower()
    if suffix in suffixes:
        return True
    try:
        with open(path, "rb") as file:
            return file.read(8).startswith(_MAGIC if suffix else (*_MAGIC, *_TIFF))
    except OSError:
        return False
