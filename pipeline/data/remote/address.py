"""Addresses of objects: which can be read, and the parts that they have in common with paths."""

import re

from pipeline.config.address import holds_secret, without_secrets
from pipeline.errors import UserError

SCHEMES = ("s3", "gs", "az", "http", "https")
_REMOTE = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


def is_remote(name: str) -> bool:
    """Whether a name is an address of a kind that can be read.

    Raises:
        UserError: it is an address of another kind, or holds credentials.
    """
    match = _REMOTE.match(name)
    if match is None:
        return False
    if match[1] not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(f"no kind of address that can be read: {match[1]}://", without_secrets(name), f"use {known}")
    if holds_secret(name):
        fix = "leave them out: they are taken from the environment (AWS_*, GOOGLE_*, AZURE_*)"
        raise UserError("an address with credentials", without_secrets(name), fix)
    return True


class Url(str):
    """The address of an object, with those parts of it that a path has."""

    __slots__ = ()

    @property
    def name(self) -> str:
        return self.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        return Url(self.rpartition("/")[0])
