"""Packages that a library would import for a service of its own, of which nothing here makes use."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_out(*packages: str) -> Iterator[None]:
    """While it is open, these count as not installed, unless they are imported already; all is as before afterwards.

    What a library tries to import because it might be there costs every start of a run, and whoever has installed more
    pays more: W&B and MLflow alone make a quarter of all imports.
    """
    absent = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: Python's own sign for it
    try:
        yield
    finally:
        for name in absent:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
