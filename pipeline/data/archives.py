"""Images in archives, in tables and behind a list of addresses, as sources to pack.

What cannot be read from any place (a compressed tar, a table) is first written to a plain tar beside the new shards.
"""

import contextlib
import io
import json
import os
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from braceexpand import braceexpand

from pipeline.data import tars
from pipeline.data.images import BadImage
from pipeline.data.items import Item, Source
from pipeline.data.labels import class_names, parse_label
from pipeline.data.mask_files import MASK
from pipeline.data.names import escape
from pipeline.errors import UserError

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
_ROWS = 64  # of a table that are held at once


def is_archive(source: str) -> bool:
    """Whether this names what this module opens."""
    return source.endswith((*ARCHIVES, *LISTS, TABLE))


def open_archives(source: str, spool: Path) -> Source:
    """Open tar archives (`a.tar`, `part-{00..09}.tar.gz`), tables (`*.parquet`) or a list of addresses (`urls.txt`).

    A sample's `.txt`, `.json` and `.seg.png` come along. Labels are its `.cls`; without any, its folder in the archive.
    Of a table these are the columns `image` (bytes, or a structure that holds `bytes`), `label` and `caption`. A line
    of a list is an address, and behind tabs a label and a caption, if it has them.

    Args:
        spool: an existing folder for what has to be unpacked.

    Raises:
        UserError: a file is missing, damaged or without images.
    """
    names = list(braceexpand(source))
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        raise UserError("no such file", escape(missing[0]), "correct the name")
    if source.endswith(LISTS):
        return _listed(names)
    items: list[tuple[Item, int | None, str]] = []
    classes = class_names(Path(names[0]))
    for number, name in enumerate(names):
        if name.endswith(".tar"):
            path = Path(name)
        elif name.endswith(TABLE):
            path, classes = _spooled(spool, number, partial(_write_table, name)), classes or _table_classes(name)
        else:
            path = _spooled(spool, number, partial(_write_unpacked, name))
        items += _items_of(path, f"{os.path.basename(name)}/" if len(names) > 1 else "")
    if not items:
        raise UserError("there are no images in it", escape(source), "name an archive of images")
    return _with_folders(items) if all(label is None for _, label, _ in items) else _source(items, classes)


def _source(items: Sequence[tuple[Item, int | None, str]], classes: list[str] | None) -> Source:
    return Source({"train": [item for item, _, _ in items]}, None if classes is None else list(map(escape, classes)))


def _with_folders(items: Sequence[tuple[Item, int | None, str]]) -> Source:
    """Folders as classes, if all images lie in some."""
    folders = [key.partition("/")[0] if "/" in key else "" for _, _, key in items]
    classes = sorted(set(folders))
    if "" in classes or len(classes) < 2:
        return _source(items, None)
    labelled = [
        (Item(item.name, partial(_relabelled, item, classes.index(folder)), item.others), None, "")
        for (item, _, _), folder in zip(items, folders, strict=True)
    ]
    return _source(labelled, classes)


def _relabelled(item: Item, label: int) -> tuple[Any, int | None]:
    return item.load()[0], label


def _items_of(path: Path, prefix: str) -> Iterator[tuple[Item, int | None, str]]:
    """Item, label and key of every sample with an image."""
    with open(path, "rb", buffering=0) as file:
        for sample in tars.walk(path):
            if sample.image is None:
                continue
            label = None
            if sample.label is not None:
                with contextlib.suppress(ValueError):  # a label that is none is a missing one
                    label = parse_label(os.pread(file.fileno(), sample.label.size, sample.label.offset))
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
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def _spooled(spool: Path, number: int, write: Any) -> Path:
    """A plain tar that is written once, also over several starts."""
    path = spool / f".spool-{number:06d}.tar"
    if not path.exists():
        aside = path.with_suffix(".part")
        with open(aside, "wb") as file:
            write(file)
        os.replace(aside, path)
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
    except (EOFError, ValueError, lzma.LZMAError, gzip.BadGzipFile) as error:
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
    """Rows with images as samples of a plain tar; a label that is no number is left out."""
    table = _open_table(name)
    columns = table.schema_arrow.names
    image, label, caption = (next((c for c in known if c in columns), None) for known in (_IMAGES, _LABELS, _CAPTIONS))
    if image is None:
        what = f"no column of images among {', '.join(map(escape, columns))}"
        raise UserError(what, escape(name), f"name one {' or '.join(_IMAGES)}")
    number = 0
    with tarfile.open(fileobj=out, mode="w|") as tar:
        for batch in table.iter_batches(_ROWS, columns=[c for c in (image, label, caption) if c]):
            for row in batch.to_pylist():
                content = row[image]
                content = content.get("bytes") if isinstance(content, dict) else content
                files = {"jpg": content} if isinstance(content, bytes) else {}
                if files and label and isinstance(row[label], int) and row[label] >= 0:
                    files["cls"] = str(row[label]).encode()
                if files and caption and row[caption] is not None:
                    files["txt"] = str(row[caption]).encode()
                for extension, data in files.items():
                    info = tarfile.TarInfo(f"{number:09d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1


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
    labels = 0
    for name in names:
        for number, line in enumerate(Path(name).read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
            address, *rest = line.strip("\n").split("\t")
            if not address or address.startswith("#"):
                continue
            if not address.startswith(("http://", "https://")):
                raise UserError("not a web address", f"{escape(name)}:{number}", "list http:// or https:// addresses")
            label = int(rest[0]) if rest and rest[0].isdecimal() else None
            caption = rest[1] if len(rest) > 1 else ""
            labels += label is not None
            others = partial(_caption, caption) if caption else dict
            items.append(Item(escape(address.partition("?")[0]), partial(_fetch, address, label), others))
    if not items:
        raise UserError("the list names no images", escape(names[0]), "list addresses, one a line")
    return Source({"train": items}, class_names(Path(names[0])) if labels else None, waits=True)


def _caption(text: str) -> dict[str, bytes]:
    return {"txt": text.encode(errors="surrogateescape")}


def _fetch(address: str, label: int | None) -> tuple[bytes, int | None]:
    """What an address gives, tried a few times where another answer may come; a dead one costs its own sample.

    Raises:
        BadImage: it gives nothing.
    """
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
