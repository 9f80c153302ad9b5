"""The one error a user is meant to read, the system's and the installation's among them, and how they write names."""

import errno
import os
import re

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
    where = place_of(error)
    if error.filename is not None:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    fix = _FIXES.get(error.errno or 0, "check the path, its rights and the file system")
    return UserError(error.strerror or str(error) or type(error).__name__, where, fix)


def of_a_package(error: ImportError) -> UserError:
    """A package that is missing or broken, with what to install; a mistake of our own is raised again."""
    if (error.name or "").partition(".")[0] in ("pipeline", "kernels"):
        raise error
    name = error.name or place_of(error)
    wanted = _requirement(error.name or "")
    fix = f"pip install --force-reinstall '{wanted}'" if wanted else "install this package again, with what it requires"
    return UserError(f"a package cannot be loaded: {error}", name, fix)


def place_of(error: BaseException) -> str:
    """File and line that raised an error."""
    import traceback  # few starts of a command or an endpoint have an error to place

    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}, line {frames[-1].lineno}"


def _requirement(module: str) -> str | None:
    """What this package requires that brings a module: `nvidia-dali-cuda130>=2.2` for `nvidia.dali.fn`."""
    from importlib import metadata  # as above

    try:
        declared = metadata.requires("poa-pretrain") or []
    except metadata.PackageNotFoundError:  # started from its folder
        declared = []
    wanted = {text.partition(";")[0].strip() for text in declared}
    parts = re.split(r"[._]", module.lower())
    for count in range(len(parts), 0, -1):
        name = re.compile(rf"{'-'.join(map(re.escape, parts[:count]))}(-[\w-]+)?(\W|$)")
        found = [text for text in wanted if name.match(text.lower().replace("_", "-"))]
        if len(found) == 1:
            return found[0]
    return None
