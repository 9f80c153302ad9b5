"""What a start costs: a run of one step from `poa train` to its end, in processes of their own."""

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

_IMPORT = re.compile(r"^import time: +(\d+) \| +\d+ \| *([^.\s]+)", re.MULTILINE)
_PACKAGES = 12


def benchmark_start(config: str, overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """Train one step, and do nothing with it, several times over.

    The figures hold all of a run's life: starting, one step, its checkpoint and the end of the process.

    Args:
        config: path or name of the experiment, as `poa train` takes it.
        overrides: of the experiment.
        rounds: how many starts.

    Returns:
        Quickest, median and slowest start, by the CPU time of all its processes (the metrics endpoint is one of them)
        and by the clock; and the packages that take longest to import, by the clock, without what they import in turn.

    Raises:
        UserError: the experiment cannot be trained.
    """
    cpu, wall = [], []
    with tempfile.TemporaryDirectory() as directory:
        for i in range(rounds):
            began, spent = time.perf_counter(), _children()
            _train(config, overrides, Path(directory) / str(i))
            cpu.append(_children() - spent)
            wall.append(time.perf_counter() - began)
        told = _train(config, overrides, Path(directory) / "imports", "-X", "importtime")
    packages: Counter[str] = Counter()
    for microseconds, package in _IMPORT.findall(told):
        packages[package] += int(microseconds)
    return {
        "cpu_seconds": {"min": min(cpu), "median": statistics.median(cpu), "max": max(cpu)},
        "wall_seconds": {"min": min(wall), "median": statistics.median(wall), "max": max(wall)},
        "import_seconds": {package: spent / 1e6 for package, spent in packages.most_common(_PACKAGES)},
        "rounds": rounds,
    }


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _train(config: str, overrides: Sequence[str], run: Path, *interpreter: str) -> str:
    here = str(Path(__file__).parents[2])
    words = [config, *overrides, f"run.dir={run}", "run.max_steps=1", "--quiet"]
    result = subprocess.run(
        [sys.executable, *interpreter, "-m", "pipeline", "train", *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        last = result.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
        raise UserError(f"a start failed ({last})", config, "mend what `poa train` says of it")
    return result.stderr
