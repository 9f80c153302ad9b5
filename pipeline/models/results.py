"""What evaluations of a run found, as `RUN/eval/METHOD.json` keeps it beside the checkpoints that it is about."""

import math
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import printable
from pipeline.files import read_json

Results = dict[str, dict[str, Any]]
_NUMBERS = ("accuracy", "params", "gflops")


def read_results(path: Path) -> Results:
    """Entries by name of sub-network; empty if there is no such file. What is no result is left out, by name.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    try:
        entries = read_json(path, "remove it and run `poa eval` again")
    except FileNotFoundError:
        return {}
    odd = [name for name, entry in entries.items() if not _is_result(entry)]
    if odd:
        print(printable(f"warning: left out {', '.join(odd)} of {path}: no result"), file=sys.stderr)
    return {name: entry for name, entry in entries.items() if name not in odd}


def _is_result(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    numbers = [entry.get(key) for key in _NUMBERS]
    return all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in numbers) and all(
        entry[size] > 0 for size in _NUMBERS[1:]
    )
