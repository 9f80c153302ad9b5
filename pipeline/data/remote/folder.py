"""A folder of shards in a store: its catalog, copied to this node once, and reads of its shards."""

import fcntl
import functools
import hashlib
import os
from pathlib import Path

from pipeline.data.catalog import CATALOG, ROWS, Catalog
from pipeline.data.remote.patience import SourceError
from pipeline.data.remote.store import PART, Store
from pipeline.errors import UserError
from pipeline.files import put_in_place


class RemoteFolder:
    """Shards below an address, as its catalog lists them.

    Args:
        url: of the folder.

    Raises:
        UserError: there is no catalog, or it cannot be read.
    """

    def __init__(self, url: str) -> None:
        self.store = Store(url)
        try:
            content = self.store.read(CATALOG, 0, self.store.size(CATALOG))
            rows = self._rows_here()
        except SourceError as error:
            if error.passing or "no such object" not in error.what:
                raise
            fix = f"poa shards index the shards on a disk, and copy {CATALOG} and {ROWS} beside those in the store"
            raise UserError("the shards in a store have no catalog there", error.where, fix) from error
        self.catalog = Catalog(content, rows, f"{url}/{CATALOG}")

    def open(self, name: str, number: int) -> "RemoteShard":
        """A shard, of which nothing is read yet but its size.

        Raises:
            UserError: it is not the one that the catalog describes, or cannot be had.
        """
        self.catalog.require(number, self.store.size(name), f"{self.store.url}/{name}")
        return RemoteShard(self.store, name)

    def _rows_here(self) -> Path:
        """Fetch `rows.npy`, by one process of this node for all."""
        size, version = self.store.size(ROWS), self.store.version(ROWS)
        folder = _cache_home() / "poa"
        name = hashlib.sha256(repr((self.store.url, version, size)).encode()).hexdigest()[:24]
        path = folder / f"{name}.npy"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if version is None or not path.exists():  # without a version, what lies here may be old
                    self._fetch(path, size)
        except OSError as error:
            fix = "make room, or set XDG_CACHE_HOME to a folder on a local disk"
            raise UserError(f"cannot keep {ROWS} here: {error.strerror}", str(path), fix) from error
        return path

    def _fetch(self, path: Path, size: int) -> None:
        with put_in_place(path) as aside, open(aside, "wb") as file:
            for start in range(0, size, PART):  # it may not fit into memory as one
                file.write(self.store.read(ROWS, start, min(PART, size - start)))


def _cache_home() -> Path:
    if place := os.environ.get("XDG_CACHE_HOME"):
        return Path(place)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:  # a user whom the system does not know, as in some containers
        fix = "set HOME, or XDG_CACHE_HOME to a folder on a local disk"
        raise UserError(f"this user has no home, and {ROWS} is kept there", "environment", fix) from error


class RemoteShard:
    """Bytes of an object, read like those of an open file."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name

    def read(self, offset: int, size: int) -> bytearray:
        """Raises SourceError: they cannot be had."""
        return bytearray(self.store.read(self.name, offset, size))


open_remote = functools.lru_cache(RemoteFolder)
"""The folder at an address; one and the same for all of a process, so that all see one version."""
