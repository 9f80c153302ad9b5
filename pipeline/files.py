"""Writing so that a reader sees the old file or the new one, never half of one."""

import hashlib
import json
import os
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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a `.jsonl` file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise
    return records


def write_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
