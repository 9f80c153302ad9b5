"""Addresses in stores: what may stand for a password in them is never taken, kept or shown."""

import re

_SECRET = re.compile(r"(?<=://)[^/@\s]*@|\?[^\s\"'?]*=[^\s\"']*")


def holds_secret(text: str) -> bool:
    """Whether an address has a user name or a query, such as a signature."""
    return _SECRET.search(text) is not None


def without_secrets(text: str) -> str:
    """The text without these."""
    return _SECRET.sub(lambda match: "?..." if match[0].startswith("?") else "", text)
