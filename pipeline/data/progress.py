"""One progress bar: lively on a terminal, a line now and then in a file."""

import sys
from typing import Any

_SECONDS = 60.0  # between two lines of a log


def progress_bar(shown: bool, **options: Any) -> Any:
    """tqdm's bar on standard error.

    Args:
        shown: False for none.
        options: of tqdm.
    """
    from tqdm import tqdm

    terminal = sys.stderr is not None and sys.stderr.isatty()
    times = {} if terminal else {"mininterval": _SECONDS, "maxinterval": _SECONDS}
    return tqdm(disable=not shown, dynamic_ncols=terminal, **times, **options)
