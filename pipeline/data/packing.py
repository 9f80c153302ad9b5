"""One shard from its images: decoded, written and indexed by one process, and then done."""

import hashlib
import json
import signal
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from pipeline.data import indexes, tars
from pipeline.data.decoders import NO_LIMIT
from pipeline.data.encode import encode, keep_values
from pipeline.data.images import BadImage, inspect
from pipeline.data.items import Item
from pipeline.data.mask_files import MASK, encode_mask
from pipeline.data.values import decode_values
from pipeline.errors import UserError
from pipeline.files import write_atomically

_AT_ONCE = 4  # images that a thread is handed: to pass them there and back costs a good part of decoding one
_WRITTEN = 1 << 20  # bytes from which on they are hashed and written

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class ShardEntry:
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass
class Job:
    """A shard to pack.

    Attributes:
        path: of the tar.
        first: number of its first image in the split, for the keys.
        items: its images.
        shorter_side, values: see `shards.build`.
        threads: that decode images.
    """

    path: Path
    split: str
    first: int
    items: Sequence[Item]
    shorter_side: int | None
    values: bool
    threads: int


@dataclass
class Packed:
    """What came of a job.

    Attributes:
        entry: None if none of the images is usable; there is no tar then.
        sources: key and name of every sample.
        left_out: name and reason of the others.
    """

    entry: ShardEntry | None
    sources: list[tuple[str, str]]
    left_out: list[tuple[str, str]]

    @property
    def images(self) -> int:
        return len(self.sources) + len(self.left_out)


def done_path(shard: Path) -> Path:
    """The file whose presence says that a shard is complete."""
    return shard.with_name(f".{shard.stem}.json")


def pack_all(jobs: Iterable[Job], processes: int, advance: Callable[[int], None]) -> Iterator[Packed]:
    """Pack shards, as many at once as there are processes; those that are done already are not packed again.

    Args:
        processes: 1 for none but this one, which then decodes in threads.
        advance: called with the number of images that got done.

    Yields:
        What came of each job, in their order.

    Raises:
        UserError: a process has died.
    """
    if processes == 1:
        yield from (_done(job, advance) or pack(job, advance) for job in jobs)
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _leave_interrupts_to_the_parent)
    try:
        waiting: deque[Packed | Future[Packed]] = deque()
        for job in jobs:
            waiting.append(_done(job, advance) or pool.submit(pack, job))
            while sum(isinstance(one, Future) for one in waiting) > processes + 1:
                _take_finished(waiting, advance)
            while waiting and isinstance(waiting[0], Packed):
                yield waiting.popleft()  # type: ignore[misc]
        while waiting:
            _take_finished(waiting, advance)
            while waiting and isinstance(waiting[0], Packed):
                yield waiting.popleft()  # type: ignore[misc]
    except BrokenProcessPool as error:
        fix = "give the job more memory, or pack with fewer --jobs; complete shards are kept"
        raise UserError("a process that packs has died, most likely killed for its memory", "packing", fix) from error
    except BaseException:
        for process in list((pool._processes or {}).values()):  # nobody waits for the shards that they are at
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _take_finished(waiting: "deque[Packed | Future[Packed]]", advance: Callable[[int], None]) -> None:
    """Put what came of finished jobs in their place; waits for one."""
    wait([one for one in waiting if isinstance(one, Future)], return_when=FIRST_COMPLETED)
    for place, one in enumerate(waiting):
        if isinstance(one, Future) and one.done():
            packed = waiting[place] = one.result()
            advance(packed.images)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _done(job: Job, advance: Callable[[int], None]) -> Packed | None:
    """What an earlier start made of a job, if it did."""
    try:
        found = json.loads(done_path(job.path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    entry = ShardEntry(**found["entry"]) if found["entry"] else None
    packed = Packed(entry, *(list(map(tuple, found[key])) for key in ("sources", "left_out")))
    advance(packed.images)
    return packed


def pack(job: Job, advance: Callable[[int], None] = lambda images: None) -> Packed:
    """Pack a shard, write its index, and say that it is done.

    Raises:
        OSError: it cannot be written.
    """
    packed = Packed(None, [], [])
    with _Writer(job.path) as writer:
        for (number, item), sample in _in_order_of(job):
            advance(1)
            if isinstance(sample, str):
                packed.left_out.append((item.name, sample))
                continue
            image = next(iter(sample.values()))
            digest = hashlib.blake2b(image, digest_size=5).hexdigest()  # the keys of two builds differ
            key = f"{job.split}_{job.first + number:08d}_{digest}"
            writer.write(key, sample)
            packed.sources.append((key, item.name))
        packed.entry = writer.close(len(packed.sources))
    found = {"entry": packed.entry and asdict(packed.entry), "sources": packed.sources, "left_out": packed.left_out}
    write_atomically(done_path(job.path), json.dumps(found))
    return packed


def _in_order_of(job: Job) -> Iterator[tuple[tuple[int, Item], dict[str, bytes] | str]]:
    def work(some: range) -> list[dict[str, bytes] | str]:
        return [_sample(job.items[number], job.shorter_side, job.values) for number in some]

    if job.threads == 1:
        yield from ((numbered, _sample(numbered[1], job.shorter_side, job.values)) for numbered in enumerate(job.items))
        return
    count = len(job.items)
    parts = [range(first, min(first + _AT_ONCE, count)) for first in range(0, count, _AT_ONCE)]
    with ThreadPoolExecutor(job.threads) as pool:
        for some, samples in in_order(pool, work, parts, 2 * job.threads):
            yield from zip(((number, job.items[number]) for number in some), samples, strict=True)


def _sample(item: Item, shorter_side: int | None, values: bool) -> dict[str, bytes] | str:
    """The sample's files by extension, the image first, or why there are none."""
    try:
        content, label = item.load()
        extension, data = keep_values(content) if values else encode(content, shorter_side)
        others = dict(item.others())
        if MASK in others:
            rows, cols = (decode_values(data, NO_LIMIT)[1] if values else inspect(data, NO_LIMIT)).size
            others[MASK] = encode_mask(others[MASK], (cols, rows), shorter_side)
    except BadImage as error:
        return error.reason
    except OSError as error:
        return error.strerror or "read"
    return {extension: data, **({} if label is None else {"cls": str(label).encode()}), **others}


def in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[tuple[T, R]]:
    """Like `map` over the pool's threads, but never more than `ahead` items before the consumer."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result.result()
    for first, result in waiting:
        yield first, result.result()


def header(name: str, size: int) -> bytes:
    """A member's header as tarfile makes it, the same in every build.

    Args:
        name: ASCII, at most 100 characters, as keys and their extensions are.
        size: of the member, below 8 GiB.
    """
    assert len(name) <= tarfile.LENGTH_NAME
    assert size < 8**11
    filled = bytearray(_BARE_HEADER)
    filled[: len(name)] = name.encode("ascii")
    filled[_SIZE : _SIZE + 11] = b"%011o" % size
    filled[_CHECKSUM : _CHECKSUM + 7] = b"%06o\0" % tars.checksum(filled)
    return bytes(filled)


def _bare_header() -> bytes:
    """Without name and size; the sum is that of this one."""
    info = tarfile.TarInfo()
    info.mode, info.uname, info.gname = 0o444, "root", "root"
    return info.tobuf(tarfile.USTAR_FORMAT)


_SIZE, _CHECKSUM = 124, 148  # where they stand in a header
_BARE_HEADER = _bare_header()


class _Hashed:
    """A file that is written from its beginning to its end, and the digest of what was written."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115  it outlives the call
        self.digest, self.bytes = hashlib.sha256(), 0
        self._parts: list[bytes] = []
        self._waiting = 0

    def write(self, parts: list[bytes]) -> None:
        self._parts += parts
        size = sum(map(len, parts))
        self.bytes += size
        self._waiting += size
        if self._waiting >= _WRITTEN:
            self.flush()

    def flush(self) -> None:
        data = memoryview(b"".join(self._parts))
        self._parts, self._waiting = [], 0
        self.digest.update(data)
        while data:  # a disk that is nearly full takes less
            data = data[self.file.write(data) :]

    def close(self) -> None:
        self.flush()
        self.file.close()


class _Writer:
    """Writes the samples of one shard; the file is opened by the first.

    By headers alone: tarfile's writing, and webdataset's by it, take as long as all else but the decoding.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._samples: list[tars.Sample] = []
        self._file: _Hashed | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.file.close()  # of one that failed: what waits need not fit the disk

    def write(self, key: str, sample: dict[str, bytes]) -> None:
        if self._file is None:
            self._file = _Hashed(self.path)
        members: list[tars.Member] = []
        parts: list[bytes] = []
        at = self._file.bytes
        for extension in sorted(sample):
            data, name = sample[extension], f"{key}.{extension}"
            members.append(tars.Member(extension, at + tars.BLOCK, len(data), name))
            parts += header(name, len(data)), data, bytes(-len(data) % tars.BLOCK)
            at += tars.BLOCK + len(data) + len(parts[-1])
        self._file.write(parts)
        self._samples.append(tars.Sample(tuple(members)))

    def close(self, samples: int) -> ShardEntry | None:
        """Finish the shard and its index."""
        if self._file is None:
            return None
        end = 2 * tars.BLOCK
        self._file.write([bytes(end + -(self._file.bytes + end) % tarfile.RECORDSIZE)])
        self._file.close()
        indexes.write_index(self.path, self._samples)
        return ShardEntry(self.path.name, samples, self._file.bytes, self._file.digest.hexdigest())
