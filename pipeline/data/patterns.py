"""From what a user names as shards to the files meant."""

import itertools
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from braceexpand import braceexpand

from pipeline.errors import UserError

_MOST = 1_000_000  # shards; more is a slip of the keyboard
_MANY = 32  # shards in one folder, for which it is listed
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)[.}]")
_NUMBER = re.compile(r"\d+(?=\.tar$)")
_REMOTE = re.compile(r"(?:[a-zA-Z][a-zA-Z0-9+.-]*:/|pipe:)")
_BRACES = "name its shards, e.g. train-{000..009}.tar in quotes"


def expand_shards(shards: str | Sequence[str]) -> list[Path]:
    """`list_shards` as paths."""
    return [Path(name) for name in list_shards(shards)]


def list_shards(shards: str | Sequence[str]) -> list[str]:
    """File names of a pattern with braces (`train-{000000..000009}.tar`), or of a list of such patterns.

    `~` and `$VARIABLES` stand for what they mean in a shell: a pattern in quotes never meets one.

    Raises:
        UserError: a shard is not there or cannot be one, or there is none.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    names = [name for pattern in patterns for name in _expand(str(pattern))]
    if not names:
        raise UserError("no shards", "data", "name at least one .tar file")
    listed = _listed(names)
    missing = [name for name in names if name not in listed and not _is_there(Path(name))]
    if missing:
        count = f" ({len(missing)} of {len(names)} shards missing)" if len(missing) > 1 else ""
        raise UserError(f"missing shard{count}", missing[0], _advice(Path(missing[0])))
    return names


def _listed(names: list[str]) -> set[str]:
    """Those of many names in one folder that its listing shows as files; asking for each is slow on network disks."""
    folders = Counter(os.path.dirname(name) for name in names)
    found: set[str] = set()
    for folder in (folder for folder, count in folders.items() if count >= _MANY):
        with suppress(OSError), os.scandir(folder or ".") as listing:
            files = (entry.name for entry in listing if entry.is_file(follow_symlinks=False))
            found.update(os.path.join(folder, name) for name in files if not name.endswith(".idx"))
    return found


def _expand(pattern: str) -> list[str]:
    if _REMOTE.match(pattern):
        raise UserError("a remote address, but shards are read from local files", pattern, "copy the shards to a disk")
    if not pattern:
        raise UserError("an empty name for a shard", "data", "name a .tar file")
    ranges = [(int(first), int(last)) for first, last in _RANGE.findall(pattern)]
    if math.prod(abs(last - first) + 1 for first, last in ranges) > _MOST:
        raise UserError(f"more than {_MOST} shards", pattern, "correct the numbers in braces")
    try:
        return list(braceexpand(os.path.expandvars(os.path.expanduser(pattern))))
    except ValueError as error:
        raise UserError("unbalanced braces in a shard pattern", str(error), "close every brace") from error


def _is_there(path: Path) -> bool:
    """Whether a file is there that may be a shard; what is there and cannot be one is refused."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot look for the shard: {why}", str(path), "check the rights of its folder") from error
    if stat.S_ISDIR(mode):
        raise UserError("a folder, not a shard", str(path), _within(path))
    if not stat.S_ISREG(mode):
        raise UserError("not a regular file", str(path), "name a .tar file on a disk")
    if path.suffix == ".idx":
        raise UserError("an index, not a shard", str(path), f"name {path.with_suffix('.tar')}")
    return True


def _within(folder: Path) -> str:
    """What to write instead of a folder's name."""
    try:
        with os.scandir(folder) as listing:
            names = sorted(entry.name for entry in listing if entry.name.endswith(".tar") and entry.is_file())
    except OSError:
        return _BRACES
    if not names:
        return "name a folder's .tar files; this one holds none"
    by_prefix = [list(group) for _, group in itertools.groupby(names, lambda name: _NUMBER.split(name)[0])]
    *_, last = most = max(by_prefix, key=len)
    if len(most) == 1:
        return f"name its shards: {folder / last}"
    prefix = _NUMBER.split(last)[0]
    first_number, last_number = (name.removeprefix(prefix).removesuffix(".tar") for name in (most[0], last))
    return f"name its shards in quotes: '{folder / prefix}{{{first_number}..{last_number}}}.tar'"


def _advice(path: Path) -> str:
    if re.search(r"[*?\[\]]", str(path)):
        return f"globs are not read here, so that no shard is lost unseen: {_BRACES}"
    return "correct the pattern, or build the shard"
