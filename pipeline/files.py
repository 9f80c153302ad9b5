"""Files as every room writes and reads them.

A reader sees the old file or the new one, never half of one; what is written follows the umask; what a crash cut short
is left out by name instead of ending the reader.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, printable

if TYPE_CHECKING:
    from torch import Tensor


ASIDE = re.compile(r"\.poa\.(?P<host>.+)\.(?P<process>\d+)\.\d+\.tmp")
"""Name of a file that is being written, or of what a killed process left of it."""

_numbers = count()


@contextmanager
def put_in_place(path: Path) -> Iterator[Path]:
    """Give the name of a file to write beside `path`; it becomes `path` if the block ends well, else it goes.

    No other process has that name, so that two may write one file at once: the later one stays.

    Raises:
        OSError: it cannot be renamed.
    """
    _sweep(path.parent)
    aside = path.with_name(f".poa.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(aside)):  # a write that fails names no file
            error.filename = str(path)
        raise


@lru_cache(1024)
def _sweep(folder: Path) -> None:
    """Remove what processes of this machine left that were killed while they wrote; once for each folder."""
    with suppress(OSError):
        for name in os.listdir(folder):
            match = ASIDE.fullmatch(name)
            if match and match["host"] == socket.gethostname() and not is_alive(int(match["process"])):
                (folder / name).unlink()


def is_alive(process: int) -> bool:
    """Whether a process of this machine is there, whoever it belongs to."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep others out of a block that writes into a folder what it has read there; on a file system without locks for
    folders (NFS) it keeps out nobody.

    Raises:
        OSError: there is no such folder, or it cannot be read.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write aside, flush to disk, rename. What is not UTF-8 (names of files may be so) is escaped."""
    with put_in_place(path) as aside, open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def save_tensors(tensors: Mapping[str, "Tensor"], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and flush it to disk. The library alone would keep others from reading it.

    Raises:
        OSError: the disk is full and the like.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with open(path, "wb") as file:  # only to learn what rights a new file gets here
        mode = os.fstat(file.fileno()).st_mode & 0o777
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(str(error)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)
    sync(path)


def require_writable(directory: Path, fix: str) -> None:
    """Find out before the work whether its result can be written; by trying, since rights are not all that counts.

    Raises:
        UserError: it cannot; `fix` says what to do.
    """
    import tempfile  # the endpoint of every run imports this file, and does not need that

    try:
        with tempfile.TemporaryFile(dir=directory):
            return
    except OSError as error:
        raise UserError(f"cannot write here: {error.strerror}", str(directory), fix) from error


@contextmanager
def writable_folder(directory: Path, fix: str) -> Iterator[None]:
    """Make a folder, if need be, and find out whether it can be written. Of what was made for it nothing that is empty
    stays if the block does not end well.

    Raises:
        UserError: it cannot; `fix` says what to do.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot use the directory: {error.strerror}", str(directory), fix) from error
        require_writable(directory, fix)
        yield
    except BaseException:
        remove_empty(made)
        raise


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that hold one another, the innermost first; one that others use by now is not empty, nor are those
    around it."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


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


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or holds something else; `fix` says what to do.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", str(path), fix) from error
    except (ValueError, RecursionError) as error:
        raise UserError("the file is damaged: it is not JSON", str(path), fix) from error
    if not isinstance(value, dict):
        raise UserError("the file is damaged: it holds no JSON object", str(path), fix)
    return value


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
        print(printable(f"warning: left out line {broken[0]}{more} of {path}: no record"), file=sys.stderr)
    return list(records.values())


def _parse(line: str, key: str | None) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
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
        with open(self.path, "ab+", buffering=0) as file:
            before, data = file.seek(0, os.SEEK_END), line.encode()
            if before:
                file.seek(-1, os.SEEK_END)
                data = data if file.read(1) == b"\n" else b"\n" + data  # the line before was cut short
            if file.write(data) != len(data):  # the disk became full within the line
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
