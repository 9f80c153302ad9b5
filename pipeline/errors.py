"""The one error a user is meant to read, the system's among them, and how names are written in what users read."""

import errno
import os
import re
import traceback

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FIXES = {
    errno.ENOENT: "name a path that exists",
    errno.EACCES: "choose another path, or ask its owner for rights",
    errno.EPERM: "choose another path, or ask its owner for rights",
    errno.EROFS: "choose another file system",
    errno.ENOSPC: "make room, or choose another file system",
    errno.EDQUOT: "make room within the quota, or choose another file system",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def printable(text: str) -> str:
    """A name on one line and in UTF-8: what would break the line, steer a terminal or fail to encode is escaped."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def short(value: object) -> str:
    """A value as Python writes it, cut where it fills more than a line."""
    text = repr(value) if value is not None else "null"
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


class UserError(Exception):
    """A mistake that the user can mend; the command prints it as one line and exits with code 2.

    Args:
        what: what is wrong.
        where: the key, file or argument at fault.
        fix: what to do about it.

    Attributes:
        shared: every rank raises this error, so one of them may speak for all.
    """

    shared = False

    def __init__(self, what: str, where: str, fix: str):
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return printable(f"{self.what} ({self.where}): {self.fix}")


def of_the_system(error: OSError) -> UserError:
    """What the operating system refused, with the file; without one, with the place in the code that asked for it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}, line {frames[-1].lineno}"
    if error.filename is not None:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    fix = _FIXES.get(error.errno or 0, "check the path, its rights and the file system")
    return UserError(error.strerror or str(error) or type(error).__name__, where, fix)
