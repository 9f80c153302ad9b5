"""Pieces of remote shards on the disk of a node, shared by its ranks.

Any rank may fetch, read or evict; each may die at any time. A file appears whole or not at all (rename), is named after
the version of what it holds, and its room is taken before it is fetched, so that the limit holds at every moment. Locks
are flock: the kernel drops them with their process. What is not here is not waited for: it is read from the store.
"""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.data.order import WORTH
from pipeline.data.remote.folder import RemoteShard
from pipeline.data.remote.patience import WEATHER, SourceError
from pipeline.data.remote.store import PART
from pipeline.errors import UserError

_log = logging.getLogger(__name__)
_THREADS = 2  # that fetch, of each rank
_LOOK = 0.5  # seconds until a rank looks again at what others wish and fetch
_OLDEST = 8  # of so many that are evicted, one is the oldest
_WISH, _PART, _LOCK = "wish.", ".part", "lock"


class Piece(NamedTuple):
    """Bytes of a shard that are fetched and kept as one.

    Attributes:
        source: its name.
    """

    shard: RemoteShard
    offset: int
    size: int
    source: str

    @property
    def file(self) -> str | None:
        """Its name in the cache; None if the store does not tell versions apart, so that it must not be kept."""
        store, name = self.shard.store, self.shard.name
        version = store.version(name)
        what = (store.url, name, version, self.offset, self.size)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:32] if version else None


class _File:
    """An open file, closed with its last reference: a read may outlive its place in the cache."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        now = time.time_ns()
        os.utime(self.descriptor, ns=(now, now))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Cache:
    """Reads of pieces that lie in a folder, and two threads that bring there what is wanted next.

    Args:
        folder: on a local disk, the same for all ranks of the node.
        limit: bytes of all files together.
        piece: of a number, None for one that is not to be kept; may raise SourceError.

    Raises:
        UserError: the folder cannot be used.
    """

    def __init__(self, folder: Path, limit: int, piece: Callable[[int], Piece | None]) -> None:
        self.folder, self.limit, self._piece = folder, limit, piece
        self._wish: dict[int, float] = {}
        self._pieces: dict[int, tuple[Piece, str]] = {}
        self._open: dict[int, _File] = {}
        self._useless: set[int] = set()
        self._evicted = 0
        self._is_full = self._stop = False
        self._changed, self._planning = threading.Condition(), threading.Lock()
        self._planned = self._wish
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._own = folder / f"{_WISH}{secrets.token_hex(8)}"
                self._alive = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(self._alive, fcntl.LOCK_EX)  # for as long as this process lives
        except OSError as error:
            fix = "name a folder on a local disk of the node, or null"
            raise UserError(f"cannot keep data here: {error.strerror}", str(folder), fix) from error
        self._threads = [threading.Thread(target=self._work, name="poa-cache", daemon=True) for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def want(self, pieces: Sequence[tuple[int, float]]) -> None:
        """What is read next, in the order of need, each with the portion of it that this rank reads: it is fetched if
        the ranks of the node together read most of it, and stays for as long as one of them wants it."""
        with self._changed:
            wish: dict[int, float] = {}
            for number, portion in pieces:
                wish[number] = max(portion, wish.get(number, 0.0))
            self._wish = wish
            self._changed.notify_all()

    def read(self, number: int, offset: int, size: int) -> bytearray | None:
        """Bytes of the shard that a piece is of, `offset` counted from its beginning; None if they are not here."""
        file = self._open.get(number)
        found = self._pieces.get(number)
        if found is None:
            return None
        piece, name = found
        try:
            if file is None:
                file = self._open[number] = _File(self.folder / name)
            data = bytearray(size)
            if os.preadv(file.descriptor, [data], offset - piece.offset) == size:
                return data
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("%s cannot be read (%s) and is dropped", self.folder / name, error.strerror)
        self._open.pop(number, None)
        (self.folder / name).unlink(missing_ok=True)
        return None

    def close(self) -> None:
        """Stop fetching; what is here stays."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)  # one that is still within a request ends with the process, its part is swept
        self._open.clear()
        with self._alone():
            self._own.unlink(missing_ok=True)
        os.close(self._alive)

    def bring(self) -> bool:
        """Fetch what is wanted and not here, as the threads do again and again; False if there was nothing to do."""
        with self._changed:
            wish = self._wish
        try:
            self._plan(wish)
            if self._fetch_all(wish):
                return True
        except OSError as error:  # of the folder: all goes on without it
            self._full(error.strerror or str(error))
        with self._changed:
            return self._wish is not wish

    def _work(self) -> None:
        while not self._stop:
            if not self.bring():
                with self._changed:
                    if not self._stop:
                        self._changed.wait(_LOOK)

    def _plan(self, wish: dict[int, float]) -> None:
        """Find out which objects are wanted, let go of the others, and tell the other ranks."""
        with self._planning:
            if self._planned is wish:
                return
            pieces: dict[int, tuple[Piece, str]] = {}
            for number in wish:
                if number in self._pieces:
                    pieces[number] = self._pieces[number]
                    continue
                with suppress(SourceError, UserError):  # whoever reads it will meet the same
                    piece = self._piece(number)
                    if piece and (name := piece.file):
                        pieces[number] = piece, name
            self._pieces, self._useless, self._planned = pieces, set(), wish
            for number in set(self._open) - set(pieces):
                self._open.pop(number, None)
            lines = [f"{name} {wish[number]:.6f}\n" for number, (_, name) in pieces.items()]
            with self._alone():
                os.ftruncate(self._alive, 0)
                os.pwrite(self._alive, "".join(lines).encode(), 0)

    def _fetch_all(self, wish: dict[int, float]) -> bool:
        """Whether anything was fetched."""
        fetched, wishes = False, self._wishes()
        for number in wish:
            if self._stop or self._wish is not wish:
                break
            if self._is_due(number, wishes):
                fetched |= self._fetch(number)
        return fetched

    def _is_due(self, number: int, wishes: dict[str, float]) -> bool:
        """Whether a piece is not here and worth fetching."""
        _, name = self._pieces.get(number, (None, ""))
        if number in self._useless or wishes.get(name, 0.0) < WORTH - 1e-3:  # portions are written with few digits
            return False
        return not (self.folder / name).exists()

    def _fetch(self, number: int) -> bool:
        """Whether this call has fetched it: not if somebody else is at it, or there is no room."""
        found = self._pieces.get(number)
        if found is None:
            return False
        piece, name = found
        part = self.folder / (name + _PART)
        try:
            descriptor = self._reserve(part, self.folder / name, piece.size)
        except OSError as error:
            self._useless.add(number)  # until this rank wants something else
            self._full(error.strerror or str(error))
            return False
        if descriptor is None:
            return False
        try:
            for start in range(0, piece.size, PART):
                size = min(PART, piece.size - start)
                store = piece.shard.store
                data = store.read(piece.shard.name, piece.offset + start, size, lambda: self._stop)
                os.pwrite(descriptor, data, start)
                WEATHER.kept(piece.source, size)
                if self._stop:
                    raise SourceError("stopped", str(part), "")
            os.fsync(descriptor)  # or a file of the right size may hold zeros after the power was lost
            with self._alone():
                os.replace(part, self.folder / name)
            return True
        except (SourceError, OSError) as error:
            with self._alone():  # or another rank may be about to lock what nobody will find
                part.unlink(missing_ok=True)
            self._useless.add(number)  # whoever reads it will meet what does not pass
            if isinstance(error, OSError):
                self._full(error.strerror or str(error))
            return False
        finally:
            os.close(descriptor)

    def _reserve(self, part: Path, whole: Path, size: int) -> int | None:
        """The part, locked and of its full size; None if somebody else is at it, or was.

        Raises:
            OSError: there is no room.
        """
        with self._alone():  # in which alone files become whole, and parts go
            if whole.exists():  # since this rank looked
                return None
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if _lock(descriptor):
                    self._make_room(part.name, size)
                    os.posix_fallocate(descriptor, 0, size)  # fails now if the disk is full
                    return descriptor
            except OSError:
                part.unlink(missing_ok=True)
                os.close(descriptor)
                raise
            os.close(descriptor)
            return None

    def _make_room(self, besides: str, size: int) -> None:
        """Evict what no living rank wants. Every epoch has an order of its own, so what was used last is needed no
        sooner than the rest, and evicting it leaves a part of the set here for good; a few of the oldest go as well,
        which may be of a run that has ended."""
        wishes, idle, used = self._wishes(locked=True), [], 0
        for entry in os.scandir(self.folder):
            if entry.name.startswith(_WISH) or entry.name in (_LOCK, besides):
                continue
            if entry.name.endswith(_PART) and _is_free(entry.path):
                os.unlink(entry.path)  # its process has died
                continue
            try:
                stat = entry.stat()
            except FileNotFoundError:  # one whose fetching has failed just now
                continue
            used += stat.st_size
            if entry.name not in wishes and not entry.name.endswith(_PART):
                idle.append((stat.st_mtime, stat.st_size, entry.path))
        idle.sort()
        while idle and used + size > self.limit:
            self._evicted += 1
            _, freed, path = idle.pop(0 if self._evicted % _OLDEST == 0 else -1)
            os.unlink(path)
            used -= freed
        if used + size > self.limit:
            raise OSError(errno.ENOSPC, f"{self.limit / 2**30:.3g} GiB are too few for what the ranks read next")

    def _wishes(self, locked: bool = False) -> dict[str, float]:
        """Names of the pieces that living ranks want, and the portions that they read in all."""
        if not locked:
            with self._alone():
                return self._wishes(locked=True)
        total: dict[str, float] = {}
        for path in self.folder.glob(f"{_WISH}*"):
            if path != self._own and _is_free(path):
                path.unlink(missing_ok=True)  # its process is gone
                continue
            for line in path.read_text().splitlines():
                name, portion = line.split()
                total[name] = total.get(name, 0.0) + float(portion)
        return total

    def _full(self, why: str) -> None:
        """Say once that the cache cannot take more."""
        if not self._is_full:
            _log.warning("%s takes no more (%s): what is missing is read range by range", self.folder, why)
        self._is_full = True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(path: str | Path) -> bool:
    """Whether no process holds a file."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)
