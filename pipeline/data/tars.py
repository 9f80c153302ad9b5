"""What a WebDataset shard holds: where each sample's members lie, so that any of them is one `pread` away."""

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from pipeline.data.images import EXTENSIONS
from pipeline.data.names import escape
from pipeline.errors import UserError

BLOCK = 512
_CHUNK = 1 << 20  # bytes read at once behind the end
_LONG_HEADERS = 3  # blocks: of the member that holds a long name, the name, and the header proper
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}


class Member(NamedTuple):
    """One file of a sample; `name` is its full name in the tar."""

    extension: str
    offset: int
    size: int
    name: str


class Sample(NamedTuple):
    """Neighbouring members that share a key (the name up to the first dot of its last part)."""

    members: tuple[Member, ...]

    @property
    def key(self) -> str:
        first = self.members[0]
        return first.name[: len(first.name) - len(first.extension) - 1]

    @property
    def image(self) -> Member | None:
        return self._first(EXTENSIONS)

    @property
    def label(self) -> Member | None:
        return self._first(("cls",))

    @property
    def mask(self) -> Member | None:
        """Its segmentation mask, as `mask_files.encode_mask` wrote it."""
        return self._first(("seg.png",))

    @property
    def why_no_image(self) -> str:
        """What the extensions are, where none of them is an image's."""
        if self.dotted:
            return f"the extension is all behind the first dot, here .{escape(self.dotted.extension)}: rename it"
        ends = ", ".join(escape(f".{member.extension}") for member in self.members)
        return f"{ends}, none of {', '.join(EXTENSIONS)}"

    @property
    def dotted(self) -> Member | None:
        """A member that looks like an image, but for further dots in its name."""
        for member in self.members:
            if member.extension.rpartition(".")[2] in EXTENSIONS:
                return member
        return None

    def _first(self, extensions: tuple[str, ...]) -> Member | None:
        for member in self.members:
            if member.extension in extensions:
                return member
        return None


class Contents(NamedTuple):
    """What a walk finds.

    Attributes:
        samples: in the order of the tar.
        passed_over: name and reason of what is in the file and in no sample; folders are not counted.
    """

    samples: list[Sample]
    passed_over: list[tuple[str, str]]


def no_image(shard: Path, contents: Contents) -> UserError:
    """The refusal of a shard without any image."""
    why = [f"{escape(sample.key)}: {sample.why_no_image}" for sample in contents.samples[:1]]
    why += [f"{name}: {reason}" for name, reason in contents.passed_over[:1]]
    detail = f" ({'; '.join(why)})" if why else ""
    return UserError(f"the shard holds no image{detail}", str(shard), "leave it out, or build it again")


def is_empty(shard: Path) -> bool:
    """Whether a tar has no member at all, as one that a writer opened and never used.

    Raises:
        UserError: as `scan`.
    """
    try:
        with open(shard, "rb") as file:
            head = file.read(BLOCK)
    except OSError:
        return False  # whoever reads it says why
    return head == bytes(BLOCK) and not any(scan(shard))


def walk(shard: Path) -> list[Sample]:
    """The samples of `scan`."""
    return scan(shard).samples


def scan(shard: Path) -> Contents:
    """Read every header of a tar, and of further tars that were joined to it.

    Raises:
        UserError: the file cannot be read, is no tar, is damaged or ends early.
    """
    found = Contents([], [])
    try:
        with open(shard, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start: int | None = 0
            while start is not None:
                end = _walk_archive(file, shard, start, size, found)
                start = _next_archive(file, end, size, found)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot read the shard: {why}", str(shard), "check its path and rights") from error
    return found


def _walk_archive(file: IO[bytes], shard: Path, start: int, size: int, found: Contents) -> int:
    """Take up one archive's members; returns where its last one ends."""
    file.seek(start)
    end = start
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                end = tar.offset  # of the next header, sparse members' holes left out
                if end > size:
                    break
                _take(info, found)
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
    except tarfile.TarError as error:
        raise _no_tar(file, shard, error) from error
    if size < end + 2 * BLOCK:
        raise UserError("the tar is truncated", str(shard), "copy it again or rebuild it")
    if os.pread(file.fileno(), BLOCK, end).strip(b"\0"):
        what = f"the tar is damaged: no header at byte {end}, with {size - end} bytes behind it"
        raise UserError(what, str(shard), "copy it again or rebuild it")
    return end


def _no_tar(file: IO[bytes], shard: Path, error: tarfile.TarError) -> UserError:
    magic = os.pread(file.fileno(), 8, 0)
    for begin, name in _COMPRESSED.items():
        if magic.startswith(begin):
            return UserError(f"compressed with {name}, not a plain tar", str(shard), "unpack it into a plain .tar")
    return UserError(f"not a tar archive: {error}", str(shard), "build or copy the shard again")


def _next_archive(file: IO[bytes], end: int, size: int, found: Contents) -> int | None:
    """Where another archive begins behind the end of one, None if nothing does; other bytes are passed over."""
    data = first_byte(file.fileno(), end, size)
    if data is None:
        return None
    start = data - (data - end) % BLOCK
    try:
        tarfile.TarInfo.frombuf(os.pread(file.fileno(), BLOCK, start), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        found.passed_over.append((f"{size - start} bytes", f"behind the end of the archive, from byte {start} on"))
        return None
    return start


def first_byte(descriptor: int, start: int, size: int) -> int | None:
    """Where the first byte other than 0 stands from `start` on."""
    for offset in range(start, size, _CHUNK):
        match = re.search(rb"[^\0]", os.pread(descriptor, _CHUNK, offset))
        if match:
            return offset + match.start()
    return None


def _take(info: tarfile.TarInfo, found: Contents) -> None:
    """Add a member to the samples, or to what is passed over."""
    folder, _, base = info.name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if info.isreg() and not info.issparse() and stem and len(extension.split()) == 1:
        key = f"{folder}/{stem}" if folder else stem
        member = Member(extension.lower(), info.offset_data, info.size, info.name)
        if found.samples and found.samples[-1].key == key:
            found.samples[-1] = Sample((*found.samples[-1].members, member))
        else:
            found.samples.append(Sample((member,)))
    elif not info.isdir():
        found.passed_over.append((escape(info.name), _why(info, stem, dot, extension)))


def _why(info: tarfile.TarInfo, stem: str, dot: str, extension: str) -> str:
    """Why a member is in no sample."""
    if info.issym() or info.islnk():
        return f"a link to {escape(info.linkname)}, which holds no bytes"
    if info.issparse():
        return "stored with holes (sparse)"
    if not info.isreg():
        return "neither file nor folder"
    if not dot:
        return "no extension"
    if not stem:
        return "nothing before the first dot"
    return "white space in its extension" if extension.strip() else "no extension behind the first dot"


def key_at(read: Callable[[int, int], bytes | bytearray], offset: int) -> str:
    """The key of the sample whose member begins at an offset, from the headers before it.

    Args:
        read: gives the bytes at an offset.
    """
    for blocks in (_LONG_HEADERS, 1):  # a long name stands in a member of its own before
        start = max(offset - blocks * BLOCK, 0)
        try:
            with tarfile.open(fileobj=io.BytesIO(read(start, offset - start) + bytes(2 * BLOCK)), mode="r:") as tar:
                info = tar.next()
        except tarfile.TarError:
            continue
        if info is not None and start + info.offset_data == offset:
            return _key(info.name)[0]
    return f"at byte {offset}"


def _key(name: str) -> tuple[str, str]:
    """A member's key, and its extension: all behind the first dot of the last part."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension


def image_places(samples: Iterable[Sample]) -> Iterator[tuple[int, int]]:
    """(offset, size) of the image of every sample that has one."""
    return ((s.image.offset, s.image.size) for s in samples if s.image)
