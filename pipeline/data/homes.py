"""Where shards lie, on a disk or in a store: their catalogs, class names and bytes, whichever it is."""

import os
from pathlib import Path
from typing import Protocol

from pipeline.data.catalog import Catalog, open_catalog
from pipeline.data.labels import class_names
from pipeline.data.remote.address import Url, is_remote
from pipeline.data.remote.folder import open_remote
from pipeline.data.remote.patience import SourceError, judge, patiently

ShardName = Path | Url


class OpenShard(Protocol):
    """A shard whose bytes can be read from any thread."""

    def read(self, offset: int, size: int) -> bytearray: ...


class LocalShard:
    """An open file that is closed with its last reference, so that a reader may outlive its place in a cache."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = patiently(self._open, path)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise judge(error, self.path) from error

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytearray:
        """Raises SourceError: the file cannot be read there."""
        data = bytearray(size)
        try:
            count = os.preadv(self.descriptor, [data], offset)
        except OSError:
            count = patiently(lambda: self._again(data, offset), self.path)
        if count != size:
            fix = "bring back the whole shard, and start again"
            raise SourceError("the shard ends within a sample", self.path, fix)
        return data

    def _again(self, data: bytearray, offset: int) -> int:
        try:
            return os.preadv(self.descriptor, [data], offset)
        except OSError as error:
            raise judge(error, self.path) from error


def shard_name(name: str) -> ShardName:
    return Url(name) if is_remote(name) else Path(name)


def catalog_of(folder: str) -> Catalog | None:
    """The catalog of a folder; None without one, which only a folder on a disk may be.

    Raises:
        UserError: it cannot be read.
    """
    return open_remote(folder).catalog if is_remote(folder) else open_catalog(Path(folder))


def open_shard(name: str, listed: tuple[Catalog, int] | None) -> OpenShard:
    """Open a shard.

    Args:
        name: path or address.
        listed: its catalog and number there, which it must fit.

    Raises:
        UserError: it cannot be had, or is another.
    """
    folder, base = os.path.split(name)
    if is_remote(name):
        assert listed is not None, "what is in a store is listed"
        return open_remote(folder).open(base, listed[1])
    shard = LocalShard(name)
    if listed:
        listed[0].require(listed[1], os.fstat(shard.descriptor).st_size, name)
    return shard


def known_classes(shard: ShardName) -> list[str] | None:
    """Class names by label from the `classes.txt` beside a shard, else from its catalog; None without.

    Raises:
        UserError: one of them cannot be read.
    """
    names = class_names(shard) if isinstance(shard, Path) else None
    listing = None if names else catalog_of(str(shard.parent))
    return listing.classes if listing and listing.number(shard.name) is not None else names
