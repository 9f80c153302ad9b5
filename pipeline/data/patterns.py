"""From what a user names as shards to the files meant."""

import fnmatch
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

from pipeline.config.address import without_secrets
from pipeline.config.data import SourceConfig
from pipeline.data.homes import ShardName, catalog_of, shard_name
from pipeline.data.remote.address import is_remote
from pipeline.errors import UserError

_MOST = 1_000_000  # shards; more is a slip of the keyboard
_MANY = 32  # shards in one folder, for which it is listed
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)[.}]")
_GLOB = re.compile(r"[*?\[]")
_NUMBER = re.compile(r"\d+(?=\.tar$)")
_ADDRESS = re.compile(r"(?:[a-zA-Z][a-zA-Z0-9+.-]*:/|pipe:)")
_BRACES = "name its shards, e.g. train-{000..009}.tar in quotes"


Shards = str | Sequence[str] | Sequence[SourceConfig]
"""Patterns of shards, or sources that have one each."""


def patterns_of(shards: Shards) -> list[str]:
    """What the user wrote, as a list."""
    parts = [shards] if isinstance(shards, str) else shards
    return [part.url if isinstance(part, SourceConfig) else str(part) for part in parts]


def expand_shards(shards: str | Sequence[str]) -> list[Path]:
    """As `list_shards`, files alone."""
    for pattern in patterns_of(shards):
        if _ADDRESS.match(pattern):
            what = "a remote address, but shards are written and checked on local files"
            raise UserError(what, without_secrets(pattern), "copy the shards to a disk")
    return [Path(name) for name in list_shards(shards)]


def name_shards(shards: Shards) -> list[ShardName]:
    """As `list_shards`, as paths and addresses."""
    return [shard_name(name) for name in list_shards(shards)]


def list_shards(shards: Shards) -> list[str]:
    """Names of a pattern with braces (`train-{000000..000009}.tar`), or of a list of such patterns, or of sources.

    `~` and `$VARIABLES` stand for what they mean in a shell: a pattern in quotes never meets one. In a store, and in
    the `url` of a source, a pattern may also be a glob. It is held against the names in the catalog, not against what
    happens to lie there, so that a lost shard is missed.

    Raises:
        UserError: a shard is not there or cannot be one, is named twice, or there is none.
    """
    parts = [shards] if isinstance(shards, str) else shards
    names: list[str] = []
    for pattern, part in zip(patterns_of(shards), parts, strict=True):
        expanded = _expand(pattern)
        globs = isinstance(part, SourceConfig) or bool(expanded and is_remote(expanded[0]))
        names += _matched(expanded) if globs else expanded
    if not names:
        raise UserError("no shards", "data", "name at least one .tar file")
    require_once(names)
    listed = _listed(names)
    missing = [name for name in names if name not in listed and not _is_there(name)]
    if missing:
        count = f" ({len(missing)} of {len(names)} shards missing)" if len(missing) > 1 else ""
        raise UserError(f"missing shard{count}", missing[0], _advice(missing[0]))
    return names


def require_once(names: list[str]) -> None:
    """Refuse a shard that is named twice, be it by two sources.

    Raises:
        UserError: one is.
    """
    places = Counter(name if is_remote(name) else os.path.abspath(name) for name in names)
    if len(places) < len(names):
        twice = next(place for place, count in places.items() if count > 1)
        fix = "name it once, or its images would count more than others"
        raise UserError("a shard is named twice", twice, fix)


def _matched(names: list[str]) -> list[str]:
    """The names with globs filled in."""
    out: list[str] = []
    for name in names:
        folder, base = os.path.split(name)
        if not _GLOB.search(base):
            out.append(name)
            continue
        listing = catalog_of(folder)
        if listing is None:
            fix = f"poa shards index the shards there, or {_BRACES}"
            raise UserError(f"a glob is held against a catalog, and {folder or '.'} has none", name, fix)
        found = fnmatch.filter(listing.names, base)
        if not found:
            raise UserError("no shard of that name is in the catalog", name, "correct the pattern")
        out += [os.path.join(folder, one) for one in sorted(found)]
    return out


def _listed(names: list[str]) -> set[str]:
    """Those of many names in one folder that its listing shows as files; asking for each is slow on network disks."""
    folders = Counter(os.path.dirname(name) for name in names if not is_remote(name))
    found: set[str] = set()
    for folder in (folder for folder, count in folders.items() if count >= _MANY):
        with suppress(OSError), os.scandir(folder or ".") as listing:
            files = (entry.name for entry in listing if entry.is_file(follow_symlinks=False))
            found.update(os.path.join(folder, name) for name in files if not name.endswith(".idx"))
    return found


def _expand(pattern: str) -> list[str]:
    if _ADDRESS.match(pattern) and not is_remote(pattern):
        raise UserError("no address that can be read", pattern, "use s3://, gs://, az://, http:// or https://")
    if not pattern:
        raise UserError("an empty name for a shard", "data", "name a .tar file")
    ranges = [(int(first), int(last)) for first, last in _RANGE.findall(pattern)]
    if math.prod(abs(last - first) + 1 for first, last in ranges) > _MOST:
        raise UserError(f"more than {_MOST} shards", pattern, "correct the numbers in braces")
    try:
        return list(braceexpand(os.path.expandvars(os.path.expanduser(pattern))))
    except ValueError as error:
        raise UserError("unbalanced braces in a shard pattern", str(error), "close every brace") from error


def _is_there(name: str) -> bool:
    """Whether a file is there that may be a shard, or an object is listed; what cannot be one is refused."""
    if is_remote(name):
        folder, base = os.path.split(name)
        listing = catalog_of(folder)
        return listing is not None and listing.number(base) is not None
    path = Path(name)
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


def _advice(path: str) -> str:
    if is_remote(path):
        return "correct the pattern, or index the shards anew and copy the catalog along"
    if re.search(r"[*?\[\]]", str(path)):
        return f"globs are not read here, so that no shard is lost unseen: {_BRACES}"
    return "correct the pattern, or build the shard"
