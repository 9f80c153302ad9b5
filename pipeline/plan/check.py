"""One finding of `poa doctor`."""

from typing import NamedTuple


class Check(NamedTuple):
    """One line of the table; `status` is pass, warn or fail."""

    name: str
    status: str
    finding: str
    fix: str = ""
