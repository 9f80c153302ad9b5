"""Writing so that a reader sees the old file or the new one, never half of one."""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write aside, flush to disk, rename."""
    aside = path.with_name(f".{path.name}.tmp")  # the same every time: what a crash leaves, the next write replaces
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_lines(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """Records of a `.jsonl` file. Lines that are no records are left out and said aloud, except the last, which a
    crash may have cut short.

    Args:
        path: of the file; one that does not exist has no records.
        key: a record has a number under this name.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    records = {number: record for number, line in enumerate(lines, 1) if (record := _parse(line, key)) is not None}
    broken = [number for number, line in enumerate(lines[:-1], 1) if line and number not in records]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        print(f"warning: left out line {broken[0]}{more} of {path}: no record", file=sys.stderr)
    return list(records.values())


def _parse(line: str, key: str | None) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if isinstance(record, dict) and (key is None or isinstance(record.get(key), int | float)):
        return record
    return None


def write_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


class Journal:
    """A `.jsonl` file that grows. A record that cannot be written is lost, which is said once; whoever writes goes on.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lost = 0

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, or nothing of it."""
        try:
            self._append(json.dumps(record) + "\n")
        except OSError as error:
            if not self._lost:
                print(f"warning: cannot write to {self.path}: {error.strerror}; its lines are lost", file=sys.stderr)
            self._lost += 1
        else:
            if self._lost:
                print(f"note: writing to {self.path} again, {self._lost} lines are lost", file=sys.stderr)
            self._lost = 0

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            data = line.encode()
            if file.write(data) != len(data):  # the disk became full within the line
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
