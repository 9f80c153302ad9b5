"""A folder that appears whole or not at all: filled aside, then renamed; what a killed process left is swept."""

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.data.names import escape
from pipeline.errors import UserError
from pipeline.files import is_alive, remove_empty

_IDENTITY = ".identity"


@contextmanager
def new_folder(destination: str | Path, identity: str | None = None) -> Iterator[Path]:
    """Give a folder to fill, which becomes the destination when the block ends well and goes away when it does not.

    An empty folder that is there already (a mounted volume, the target of a link, one in a place where only it may be
    written) is kept: the files are filled in below it and moved up.

    Args:
        identity: of what is made. What of it is complete, which a file `.NAME.json` for each part says, is kept if the
            block does not end well, and is there again in the next folder of the same identity.

    Raises:
        UserError: the destination holds something or cannot be written, or the block meets an OSError. What is
            complete and cannot be put in place is kept, and the message says where.
    """
    shown, target = escape(str(destination)), Path(os.path.realpath(destination))
    there = _require_empty(target, shown)
    aside = _beside(target, below=there)
    made = [parent for parent in aside.parents if not os.path.exists(parent)]
    try:
        _sweep(aside.parent, target.name, aside, identity)
        aside.mkdir(parents=True, exist_ok=True)
        if identity is not None:
            (aside / _IDENTITY).write_text(identity, encoding="utf-8")
    except OSError as error:
        _remove_unfinished(aside, made)
        raise UserError(f"cannot write there: {error.strerror}", shown, "check rights and space") from error
    try:
        yield aside
    except BaseException as error:
        _remove_unfinished(aside, made)
        if isinstance(error, OSError):
            raise UserError(f"cannot write: {error.strerror or error}", shown, "check rights and space") from error
        raise
    try:
        _put_in_place(aside, target, there)
    except OSError as error:
        fix = f"move the files yourself from {escape(str(aside))}, where they are all complete"
        raise UserError(f"cannot be put in place: {error.strerror}", shown, fix) from error


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`, of this process alone, to be filled and renamed; what is left of it when
    the block ends goes, and so does what killed processes of this machine left.

    Raises:
        OSError: it cannot be made.
    """
    aside = _beside(target, below=False)
    _sweep(aside.parent, target.name, aside, None)
    aside.mkdir()
    try:
        yield aside
    except OSError as error:  # of a name that the user never sees
        if isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(aside):
            error.filename = str(target / Path(error.filename).relative_to(aside))
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def complete_parts(aside: Path) -> int:
    """How much of a folder is complete."""
    return sum(1 for _ in aside.glob(".*.json"))


def forget(aside: Path) -> None:
    """Remove what says how far a folder is: from now on its parts are put together, and half of that is of no use."""
    for path in aside.glob(".*"):
        path.unlink()


def kept_of(destination: str | Path) -> int:
    """Complete parts that this process left of a destination which it did not finish."""
    target = Path(os.path.realpath(destination))
    return sum(complete_parts(_beside(target, below)) for below in (False, True))


def _remove_unfinished(aside: Path, above: list[Path]) -> None:
    """Remove a folder of which no part is complete, and the folders above it that were made for it."""
    if os.path.isdir(aside) and complete_parts(aside):
        return
    shutil.rmtree(aside, ignore_errors=True)
    remove_empty(above)


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


def _sweep(folder: Path, target: str, aside: Path, identity: str | None) -> None:
    """Take over, or remove, what builds of this destination left that ended on this machine before they were done."""
    if not folder.is_dir():
        return
    for name in os.listdir(folder):
        match = _own(name, target)
        if not match or match["host"] != socket.gethostname() or is_alive(int(match["process"])):
            continue
        with suppress(OSError):
            if identity is not None and (folder / name / _IDENTITY).read_text(encoding="utf-8") == identity:
                os.rename(folder / name, aside)
                continue
        shutil.rmtree(folder / name, ignore_errors=True)


def _put_in_place(aside: Path, target: Path, there: bool) -> None:
    if not there:
        os.rename(aside, target)
        return
    if any(not _own(name, target.name) for name in os.listdir(target)):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
    for path in sorted(aside.iterdir(), key=lambda path: path.suffix == ".json"):  # what lists the others comes last
        os.rename(path, target / path.name)
    aside.rmdir()
