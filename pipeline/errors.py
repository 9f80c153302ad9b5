"""The one error a user is meant to read, and how names are written in what users read."""

import re

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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
