"""Images in archives, in tables and behind a list of addresses, as sources to pack.

What cannot be read from any place (a compressed tar, a table) is first written to a plain tar beside the new shards.
"""

import io
import json
import os
import tarfile
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

from braceexpand import braceexpand

from pipeline.data import tars
from pipeline.data.images import BadImage
from pipeline.data.items import Item, Source
from pipeline.data.labels import CLASSES, class_names, parse_label
from pipeline.data.mask_files import MASK
from pipeline.data.names import escape
from pipeline.errors import UserError
from pipeline.files import put_in_place

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LISTS = (".txt", ".tsv")
TABLE = ".parquet"
_KEPT = ("txt", "json", MASK)  # members that are packed beside an image and its label
_IMAGES, _LABELS, _CAPTIONS = (
    ("image", "img", "jpg", "png", "bytes"),
    ("label", "cls", "class"),
    ("caption", "text", "txt"),
)
_CHUNK = 1 << 20
_SECONDS, _TRIES, _MOST_BYTES = 20, 3, 100 << 20  # of an address
_OPEN = 64  # archives, of one process
_ROWS = 64  # of a table that are held at once


def is_archive(source: str) -> bool:
    """Whether this names what this module opens."""
    return source.endswith((*ARCHIVES, *LISTS, TABLE))


def open_archives(source: str, spool: Path) -> Source:
    """Open tar archives (`a.tar`, `part-{00..09}.tar.gz`), tables (`*.parquet`) or a list of addresses (`urls.txt`).

    A sample's `.txt`, `.json` and `.seg.png` come along. Labels are its `.cls`; without any, its folder in the archive.
    Of a table these are the columns `image` (bytes, or a structure that holds `bytes`), `label` and `caption`. A line
    of a list is an address, and behind tabs a label and a caption, if it has them. `ignored` names what is passed over,
    and labels that are no numbers.

    Args:
        spool: an existing folder for what has to be unpacked.

    Raises:
        UserError: a file is missing, damaged or without images, or their folders number classes in several ways.
    """
    names = list(braceexpand(source))
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        raise UserError("no such file", escape(missing[0]), "correct the name")
    if source.endswith(LISTS):
        return _listed(names)
    items: list[tuple[Item, int | None, str]] = []
    ignored: list[str] = []
    classes = _class_names(names)
    for number, name in enumerate(names):
        if name.endswith(".tar"):
            path = Path(name)
        elif name.endswith(TABLE):
            path, classes = _spooled(spool, number, partial(_write_table, name)), classes or _table_classes(name)
        else:
            path = _spooled(spool, number, partial(_write_unpacked, name))
        prefix = f"{os.path.basename(name)}/" if len(names) > 1 else ""
        items += _items_of(_scan(path, name), path, prefix, ignored)
    if not items:
        raise UserError("there are no images in it", escape(source), "name an archive of images")
    unlabelled = all(label is None for _, label, _ in items)
    return _with_folders(items, ignored) if unlabelled else _source(items, classes, ignored)


def _class_names(names: Sequence[str]) -> list[str] | None:
    """Of the folders of all archives, which have to agree: labels are packed as they are."""
    found = {folder: class_names(Path(folder, "*")) for folder in dict.fromkeys(map(os.path.dirname, names))}
    first = next(iter(found.values()))
    for folder, classes in found.items():
        if classes != first:
            what = f"its classes are not those of {escape(names[0])}"
            raise UserError(what, escape(os.path.join(folder, CLASSES)), "build the folders each by itself")
    return first


def _source(items: Sequence[tuple[Item, int | None, str]], classes: list[str] | None, ignored: list[str]) -> Source:
    shown = None if classes is None else list(map(escape, classes))
    return Source({"train": [item for item, _, _ in items]}, shown, ignored=ignored)


def _with_folders(items: Sequence[tuple[Item, int | None, str]], ignored: list[str]) -> Source:
    """Folders as classes, if all images lie in some."""
    folders = [key.partition("/")[0] if "/" in key else "" for _, _, key in items]
    classes = sorted(set(folders))
    if "" in classes or len(classes) < 2:
        return _source(items, None, ignored)
    labelled = [
        (Item(item.name, partial(_relabelled, item, classes.index(folder)), item.others), None, "")
        for (item, _, _), folder in zip(items, folders, strict=True)
    ]
    return _source(labelled, classes, ignored)


def _relabelled(item: Item, label: int) -> tuple[Any, int | None]:
    return item.load()[0], label


def _scan(path: Path, name: str) -> tars.Contents:
    try:
        return tars.scan(path)
    except UserError as error:  # of the archive that the user named, not of what was unpacked from it
        raise UserError(error.what, escape(name), error.fix) from error


def _items_of(
    contents: tars.Contents, path: Path, prefix: str, ignored: list[str]
) -> Iterator[tuple[Item, int | None, str]]:
    """Item, label and key of every sample with an image; what is passed over is added to `ignored`."""
    ignored += (f"{escape(prefix)}{name} ({why})" for name, why in contents.passed_over)
    with open(path, "rb", buffering=0) as file:
        for sample in contents.samples:
            if sample.image is None:
                ignored.append(f"{escape(prefix + sample.key)} ({sample.why_no_image})")
                continue
            ignored += (f"{escape(prefix + member.name)} ({tars.OTHER})" for member in sample.others)
            label = None
            if sample.label is not None:
                try:
                    label = parse_label(os.pread(file.fileno(), sample.label.size, sample.label.offset))
                except ValueError as error:  # a label that is none is a missing one
                    ignored.append(f"{escape(prefix + sample.label.name)} ({error})")
            places = [(m.extension, m.offset, m.size) for m in sample.members if m.extension in _KEPT]
            image = (sample.image.offset, sample.image.size)
            item = Item(
                escape(prefix + sample.image.name), partial(_load, path, image, label), partial(_others, path, places)
            )
            yield item, label, sample.key


def _load(path: Path, place: tuple[int, int], label: int | None) -> tuple[bytes, int | None]:
    return _read(path, *place), label


def _others(path: Path, places: list[tuple[str, int, int]]) -> dict[str, bytes]:
    return {extension: _read(path, offset, size) for extension, offset, size in places}


def _read(path: Path, offset: int, size: int) -> bytes:
    return os.pread(_opened(path).fileno(), size, offset)


@lru_cache(_OPEN)
def _opened(path: Path) -> IO[bytes]:
    """Closed when nobody holds it any longer."""
    return open(path, "rb", buffering=0)


def _spooled(spool: Path, number: int, write: Any) -> Path:
    """A plain tar that is written once, also over several starts."""
    path = spool / f".spool-{number:06d}.tar"
    if not path.exists():
        with put_in_place(path) as aside, open(aside, "wb") as file:
            write(file)
    return path


def _write_unpacked(name: str, out: IO[bytes]) -> None:
    import bz2
    import gzip
    import lzma

    module: Any = bz2 if name.endswith(".bz2") else lzma if name.endswith(".xz") else gzip
    try:
        with module.open(name) as file:
            while chunk := file.read(_CHUNK):
                out.write(chunk)
    except (EOFError, ValueError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, and not what a module says of its input
            raise
        raise UserError(f"the archive is damaged: {error}", escape(name), "fetch it again") from error


def _open_table(name: str) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("tables need pyarrow", escape(name), "pip install 'poa-pretrain[parquet]'") from error
    try:
        return parquet.ParquetFile(name)
    except Exception as error:  # of several kinds
        raise UserError(f"the table cannot be read: {error}", escape(name), "name a parquet file") from error


def _write_table(name: str, out: IO[bytes]) -> None:
    """Rows as samples of a plain tar. One without bytes is an empty image, which is left out by name when it is packed,
    and a label is what the row holds: where it is none, whoever reads it says so.
    """
    table = _open_table(name)
    columns = table.schema_arrow.names
    image, label, caption = (next((c for c in known if c in columns), None) for known in (_IMAGES, _LABELS, _CAPTIONS))
    if image is None:
        what = f"no column of images among {', '.join(map(escape, columns))}"
        raise UserError(what, escape(name), f"name one {' or '.join(_IMAGES)}")
    number = 0
    with tarfile.open(fileobj=out, mode="w|") as tar:
        for batch in _batches(table, [c for c in (image, label, caption) if c], name):
            for row in batch.to_pylist():
                content = row[image]
                content = content.get("bytes") if isinstance(content, dict) else content
                files = {"jpg": content if isinstance(content, bytes) else b""}
                for extension, column in (("cls", label), ("txt", caption)):
                    if column and row[column] is not None:
                        files[extension] = str(row[column]).encode()
                for extension, data in files.items():
                    info = tarfile.TarInfo(f"{number:09d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1


def _batches(table: Any, columns: list[str], name: str) -> Iterator[Any]:
    batches = table.iter_batches(_ROWS, columns=columns)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:  # of several kinds
            raise UserError(f"the table is damaged: {error}", escape(name), "fetch it again") from error
        yield batch


def _table_classes(name: str) -> list[str] | None:
    """Names by label, where Hugging Face's `datasets` wrote them."""
    try:
        metadata = _open_table(name).schema_arrow.metadata or {}
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return next((list(features[c]["names"]) for c in _LABELS if c in features), None)
    except (KeyError, TypeError, ValueError):
        return None


def _listed(names: list[str]) -> Source:
    items: list[Item] = []
    ignored: list[str] = []
    labels = 0
    for name in names:
        text = Path(name).read_text(encoding="utf-8-sig", errors="surrogateescape")
        for number, line in enumerate(text.split("\n"), 1):  # alone: a caption may hold what Unicode calls a line's end
            address, *rest = (part.strip() for part in line.split("\t"))
            if not address or address.startswith("#"):
                continue
            if not address.startswith(("http://", "https://")):
                raise UserError("not a web address", f"{escape(name)}:{number}", "list http:// or https:// addresses")
            label = None
            if rest and rest[0]:
                try:
                    label = parse_label(rest[0].encode(errors="surrogateescape"))
                except ValueError as error:
                    ignored.append(f"{escape(name)}:{number} ({error})")
            caption = rest[1] if len(rest) > 1 else ""
            labels += label is not None
            others = partial(_caption, caption) if caption else dict
            items.append(Item(escape(address.partition("?")[0]), partial(_fetch, address, label), others))
    if not items:
        raise UserError("the list names no images", escape(names[0]), "list addresses, one a line")
    return Source({"train": items}, _class_names(names) if labels else None, ignored=ignored, waits=True)


def _caption(text: str) -> dict[str, bytes]:
    return {"txt": text.encode(errors="surrogateescape")}


def _fetch(address: str, label: int | None) -> tuple[bytes, int | None]:
    """What an address gives, tried a few times where another answer may come; a dead one costs its own sample.

    Raises:
        BadImage: it gives nothing.
    """
    import urllib.error
    import urllib.request

    reason = "unreachable"
    for attempt in range(_TRIES):
        try:
            request = urllib.request.Request(address, headers={"User-Agent": "poa"})
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                data = answer.read(_MOST_BYTES + 1)
                length = answer.headers.get("Content-Length")
            if len(data) > _MOST_BYTES:
                raise BadImage("huge")
            if length is None or len(data) == int(length):
                return data, label
            reason = "short"
        except urllib.error.HTTPError as error:
            reason = f"http {error.code}"
            if error.code < 500 and error.code != 429:
                break
        except (OSError, ValueError):  # no name, no connection, no answer in time; nonsense in an answer
            reason = "unreachable"
        time.sleep(2.0**attempt if attempt + 1 < _TRIES else 0)
    raise BadImage(reason)
