"""The index of a WebDataset shard: where each sample's members lie, so that any of them is one `pread` away."""

import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.data.images import EXTENSIONS
from pipeline.errors import UserError

BLOCK = 512


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

    def _first(self, extensions: tuple[str, ...]) -> Member | None:
        for member in self.members:
            if member.extension in extensions:
                return member
        return None


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".idx")


def walk(shard: Path) -> list[Sample]:
    """Read every header of a tar.

    Raises:
        UserError: the file cannot be read, is no tar, or ends early.
    """
    samples: list[Sample] = []
    end = 0
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                if end > size:
                    break
                if info.isreg():
                    _append(samples, info.name, info.offset_data, info.size)
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
    except OSError as error:
        raise UserError(f"cannot read the shard: {error.strerror}", str(shard), "check its path and rights") from error
    except tarfile.TarError as error:
        raise UserError(f"not a tar archive: {error}", str(shard), "build or copy the shard again") from error
    if size < end + 2 * BLOCK:
        raise UserError("the tar is truncated", str(shard), "copy it again or rebuild it")
    return samples


def _append(samples: list[Sample], name: str, offset: int, size: int) -> None:
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return
    key = f"{folder}/{stem}" if folder else stem
    member = Member(extension.lower(), offset, size, name)
    if samples and samples[-1].key == key:
        samples[-1] = Sample((*samples[-1].members, member))
    else:
        samples.append(Sample((member,)))


def write_index(shard: Path, samples: Sequence[Sample]) -> Path:
    """Write DALI's text index beside the shard, atomically: version 1.2, or 1.1 if a name holds white space."""
    named = not any(len(member.name.split()) != 1 for sample in samples for member in sample.members)
    lines = [f"v1.{2 if named else 1} {len(samples)}"]
    for sample in samples:
        fields = (f"{m.extension} {m.offset} {m.size}" + (f" {m.name}" if named else "") for m in sample.members)
        lines.append(" ".join(fields))
    path = index_path(shard)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path


def read_index(shard: Path) -> list[Sample]:
    """Read the index beside a shard and check that it describes this very file.

    Alignment and the end of the archive are checked for all members, headers in the tar for a few.

    Raises:
        UserError: the index is malformed or describes another file.
    """
    path = index_path(shard)
    try:
        samples = _parse_index(path.read_text(encoding="utf-8"))
        with open(shard, "rb", buffering=0) as file:
            problem = _mismatch(shard, file.fileno(), samples)
            if not problem and not samples[0].members[0].name:
                samples = [_named(file.fileno(), sample) for sample in samples]
    except (ValueError, IndexError, tarfile.HeaderError) as error:
        problem = f"malformed, {error}"
    if problem:
        raise UserError(f"the index does not describe its shard: {problem}", str(path), f"poa shards index {shard}")
    return samples


def _parse_index(text: str) -> list[Sample]:
    lines = text.splitlines()
    version, count = lines[0].split()
    if version not in ("v1.1", "v1.2"):
        raise ValueError(f"version {version}")
    step = 4 if version == "v1.2" else 3
    samples = []
    for line in lines[1:]:
        fields = line.split()
        if not fields or len(fields) % step:
            raise ValueError(f"line {line[:40]!r}")
        members = [
            Member(fields[i], int(fields[i + 1]), int(fields[i + 2]), fields[i + 3] if step == 4 else "")
            for i in range(0, len(fields), step)
        ]
        samples.append(Sample(tuple(members)))
    if len(samples) != int(count):
        raise ValueError(f"{len(samples)} samples where {count} are announced")
    return samples


def _named(descriptor: int, sample: Sample) -> Sample:
    """Version 1.1 of the format has no names: take them from the tar."""
    return Sample(tuple(member._replace(name=_header(descriptor, member).name) for member in sample.members))


def _mismatch(shard: Path, descriptor: int, samples: Sequence[Sample]) -> str | None:
    """Why these samples cannot be the shard's, or None."""
    members = [member for sample in samples for member in sample.members]
    if not members:
        return "it is empty"
    end = max(member.offset + -(-member.size // BLOCK) * BLOCK for member in members)
    if end + 2 * BLOCK > shard.stat().st_size:
        return "members run past its end"
    if any(member.offset < BLOCK or member.offset % BLOCK or member.size < 0 for member in members):
        return "offsets are no block boundaries"
    for member in members[:: max(len(members) // 8, 1)] + members[-1:]:
        header = _header(descriptor, member)
        cut = len(member.name) > 100 or not member.name.isascii()  # such names stand elsewhere in the tar
        if header.size != member.size or (member.name and not cut and header.name != member.name):
            return f"another member lies at byte {member.offset}"
    if os.pread(descriptor, BLOCK, end).strip(b"\0") and image_places(walk(shard)) != image_places(samples):
        return "the shard holds more"
    return None


def image_places(samples: Iterable[Sample]) -> list[tuple[int, int]]:
    """(offset, size) of the image of every sample that has one."""
    return [(s.image.offset, s.image.size) for s in samples if s.image]


def _header(descriptor: int, member: Member) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(os.pread(descriptor, BLOCK, member.offset - BLOCK), "utf-8", "surrogateescape")
