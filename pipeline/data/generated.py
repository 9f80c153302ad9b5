"""Files that DALI leaves behind: it rewrites a graph with conditions as Python, in the folder for temporary files.

The file is imported at once and never read again, but stays until the process exits; after kill -9, for ever.
"""

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PREFIX = "__autograph_generated_file"
_OLD = 3600.0  # seconds; another process may be about to import a younger one


def remove_generated_files() -> None:
    """Remove what this process's graphs have left, and what dead processes of this user left."""
    folder = Path(tempfile.gettempdir())
    # from the few files to the modules: in a forked process each of the thousands of modules looked at costs a page
    for source in folder.glob(f"{_PREFIX}*.py"):
        if source.stem in sys.modules:
            for written in (source, importlib.util.cache_from_source(str(source))):
                with suppress(OSError):
                    os.unlink(written)
    for path in _left_over(folder):
        with suppress(OSError):
            path.unlink()


def _left_over(folder: Path) -> Iterator[Path]:
    for path in (*folder.glob(f"{_PREFIX}*.py"), *folder.glob(f"__pycache__/{_PREFIX}*.pyc")):
        with suppress(OSError):
            status = path.lstat()
            if status.st_uid == os.getuid() and status.st_mtime < time.time() - _OLD:
                yield path
