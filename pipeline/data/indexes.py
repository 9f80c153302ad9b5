"""The index beside a shard, in DALI's text format: written by `poa shards index`, believed only if it fits."""

import os
import re
import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.tars import BLOCK, Member, Sample, first_byte, image_places, walk
from pipeline.errors import UserError
from pipeline.files import put_in_place

_CODEC = ("utf-8", "surrogateescape")  # names are bytes; what is no UTF-8 comes back as it was
_BLANK = re.compile(rb"\s")  # what separates fields for DALI


def index_path(shard: Path) -> Path:
    """`a.idx` for `a.tar`; other names keep all of theirs, so that no two shards share an index."""
    return shard.with_suffix(".idx") if shard.suffix == ".tar" else shard.with_name(f"{shard.name}.idx")


def has_index(shard: Path) -> bool:
    """Whether an index lies beside a shard.

    Raises:
        UserError: that cannot be told.
    """
    path = index_path(shard)
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"cannot look for the index: {error.strerror}", str(path), "check its rights") from error
    return True


def indexing(shard: Path) -> str:
    """The command that writes a shard's index."""
    return f"poa shards index {shlex.quote(str(shard))}"


def write_index(shard: Path, samples: Sequence[Sample]) -> Path:
    """Write the index beside the shard, atomically: version 1.2, or 1.1 if a name holds white space.

    Raises:
        OSError: it cannot be written; an older one is still there then.
    """
    names = [[member.name.encode(*_CODEC) for member in sample.members] for sample in samples]
    named = not any(_BLANK.search(name) for of_sample in names for name in of_sample)
    lines = [b"v1.%d %d" % (2 if named else 1, len(samples))]
    for sample, of_sample in zip(samples, names, strict=True):
        fields = [
            b"%b %d %d" % (m.extension.encode(*_CODEC), m.offset, m.size) + (b" " + name if named else b"")
            for m, name in zip(sample.members, of_sample, strict=True)
        ]
        lines.append(b" ".join(fields))
    path = index_path(shard)
    with put_in_place(path) as aside:
        aside.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read_index(shard: Path, wanted: str | None = None) -> list[Sample]:
    """Read the index beside a shard and check that it describes this very file.

    Alignment and the end of the archive are checked for all members, headers in the tar for a few.

    Args:
        wanted: see `Sample`.

    Raises:
        UserError: shard or index cannot be read, or the index is malformed or describes another file.
    """
    path = index_path(shard)
    try:
        samples = [sample._replace(wanted=wanted) for sample in _parse_index(path.read_bytes())]
        with open(shard, "rb", buffering=0) as file:
            problem = _mismatch(shard, file.fileno(), samples)
            if not problem and not samples[0].members[0].name:
                samples = _named(shard, file.fileno(), samples)
    except (ValueError, IndexError, tarfile.HeaderError) as error:
        problem = f"malformed, {error}"
    except OSError as error:
        at = path if error.filename and Path(error.filename) == path else shard
        what = f"cannot read the {'index' if at == path else 'shard'}: {error.strerror}"
        raise UserError(what, str(at), "check its rights and its disk") from error
    if problem:
        raise UserError(f"the index does not describe its shard: {problem}", str(path), indexing(shard))
    return samples


def _parse_index(content: bytes) -> list[Sample]:
    lines = content.removesuffix(b"\n").split(b"\n")
    if not lines[0]:
        raise ValueError("it is empty")
    version, count = lines[0].split()
    if version not in (b"v1.1", b"v1.2"):
        raise ValueError(f"version {version.decode(errors='replace')}")
    step = 4 if version == b"v1.2" else 3
    samples = []
    for line in lines[1:]:
        fields = line.split()
        if not fields or len(fields) % step:
            raise ValueError(f"line {line[:40].decode(errors='replace')!r}")
        members = [
            Member(
                fields[i].decode(*_CODEC),
                int(fields[i + 1]),
                int(fields[i + 2]),
                fields[i + 3].decode(*_CODEC) if step == 4 else "",
            )
            for i in range(0, len(fields), step)
        ]
        samples.append(Sample(tuple(members)))
    if len(samples) != int(count):
        raise ValueError(f"{len(samples)} samples where {int(count)} are announced")
    return samples


def _named(shard: Path, descriptor: int, samples: list[Sample]) -> list[Sample]:
    """Version 1.1 of the format has no names: take them from the tar."""
    named = [
        sample._replace(members=tuple(m._replace(name=_header(descriptor, m).name) for m in sample.members))
        for sample in samples
    ]
    if all(m.name.lower().endswith(f".{m.extension}") and "?" not in m.name for s in named for m in s.members):
        return named
    whole = {m.offset: m.name for sample in walk(shard) for m in sample.members}  # long and foreign ones stand there
    return [
        sample._replace(members=tuple(m._replace(name=whole.get(m.offset, m.name)) for m in sample.members))
        for sample in named
    ]


def _mismatch(shard: Path, descriptor: int, samples: Sequence[Sample]) -> str | None:
    """Why these samples cannot be the shard's, or None."""
    members = [member for sample in samples for member in sample.members]
    if not members:
        return "it is empty"
    size = os.fstat(descriptor).st_size
    end = max(member.offset + -(-member.size // BLOCK) * BLOCK for member in members)
    if end + 2 * BLOCK > size:
        return "members run past its end"
    if any(member.offset < BLOCK or member.offset % BLOCK or member.size < 0 for member in members):
        return "offsets are no block boundaries"
    for member in members[:: max(len(members) // 8, 1)] + members[-1:]:
        header = _header(descriptor, member)
        cut = len(member.name) > 100 or not member.name.isascii()  # such names stand elsewhere in the tar
        if header.size != member.size or (member.name and not cut and header.name != member.name):
            return f"another member lies at byte {member.offset}"
    more = first_byte(descriptor, end, size) is not None  # a member that is no sample, a joined tar, or new samples
    if more and list(image_places(walk(shard, samples[0].wanted))) != list(image_places(samples)):
        return "the shard holds more"
    return None


def _header(descriptor: int, member: Member) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(os.pread(descriptor, BLOCK, member.offset - BLOCK), *_CODEC)
