"""A folder that appears whole or not at all: filled aside, then renamed; what a killed process left is swept."""

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.names import escape
from pipeline.errors import UserError


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes the destination when the block ends well and goes away when it does not.

    An empty folder that is there already (a mounted volume, the target of a link, one in a place where only it may be
    written) is kept: the files are filled in below it and moved up.

    Raises:
        UserError: the destination holds something or cannot be written, or the block meets an OSError. What is
            complete and cannot be put in place is kept, and the message says where.
    """
    shown, target = escape(str(destination)), Path(os.path.realpath(destination))
    there = _require_empty(target, shown)
    aside = _beside(target, below=there)
    made = [parent for parent in aside.parents if not os.path.exists(parent)]
    try:
        _sweep(aside.parent, target.name)
        aside.mkdir(parents=True)
    except OSError as error:
        _remove_empty(made)
        raise UserError(f"cannot write there: {error.strerror}", shown, "check rights and space") from error
    try:
        yield aside
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        _remove_empty(made)
        if isinstance(error, OSError):
            raise UserError(f"cannot write: {error.strerror or error}", shown, "check rights and space") from error
        raise
    try:
        _put_in_place(aside, target, there)
    except OSError as error:
        fix = f"move the files yourself from {escape(str(aside))}, where they are all complete"
        raise UserError(f"cannot be put in place: {error.strerror}", shown, fix) from error


def _remove_empty(folders: list[Path]) -> None:
    """The nearest first; one that others use by now is not empty, nor are those above it."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _require_empty(target: Path, shown: str) -> bool:
    """Whether the destination is there; what it must not be is refused."""
    try:
        entries = os.listdir(target)
    except FileNotFoundError:
        return False
    except NotADirectoryError as error:
        what = "the destination is a file" if target.is_file() else "a part of the destination is a file"
        raise UserError(what, shown, "name a new folder") from error
    except OSError as error:
        raise UserError(f"cannot look there: {error.strerror}", shown, "name a new folder") from error
    if any(not _own(name, target.name) for name in entries):
        raise UserError("the destination is not empty", shown, "name a new folder, or remove this one")
    return True


def _beside(target: Path, below: bool) -> Path:
    name = f".{target.name}.{socket.gethostname()}.{os.getpid()}.partial"
    return target / name if below else target.with_name(name)


def _own(name: str, target: str) -> re.Match[str] | None:
    return re.fullmatch(rf"\.{re.escape(target)}\.(?P<host>.+)\.(?P<process>\d+)\.partial", name)


def is_partial(name: str) -> bool:
    """Whether this is the name of a folder that is being filled."""
    return re.fullmatch(r"\..+\.\d+\.partial", name) is not None


def _sweep(folder: Path, target: str) -> None:
    """Remove what builds of this destination left that were killed on this machine."""
    if not folder.is_dir():
        return
    for name in os.listdir(folder):
        match = _own(name, target)
        if match and match["host"] == socket.gethostname() and not is_alive(int(match["process"])):
            shutil.rmtree(folder / name, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether a process of this machine is there, whoever it belongs to."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def _put_in_place(aside: Path, target: Path, there: bool) -> None:
    if not there:
        os.rename(aside, target)
        return
    if any(not _own(name, target.name) for name in os.listdir(target)):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
    for path in sorted(aside.iterdir(), key=lambda path: path.suffix == ".json"):  # what lists the others comes last
        os.rename(path, target / path.name)
    aside.rmdir()
