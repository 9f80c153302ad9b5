"""One part in its own process: `python -m pipeline.bench.gpu.stage PART OUT SECONDS [--tiny]`, called by `battery`."""

import argparse
import importlib
import json
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline.files import write_atomically

_RESERVE = 5.0  # seconds of a limit that a part leaves, to end by itself

MODULES = {
    "machine": "machine.run",
    "exact": "exact.run",
    "kernels": "contest.run",
    "step": "step.run",
    "engines": "step.run_engines",
    "shards": "training.make_shards",
    "training": "training.run",
    "training_eager": "training.run_eager",
}
"""Module and function of each part."""


@dataclass
class Stage:
    """What a part works with.

    Attributes:
        name: of the part.
        out: where its figures go.
        deadline: when it has to be done, on the monotonic clock.
        tiny: small shapes, for a rehearsal.
        found: its figures, written to `out` as it goes, so that a part that is killed leaves what it had.
    """

    name: str
    out: Path
    deadline: float
    tiny: bool
    found: dict[str, Any] = field(default_factory=lambda: {"lines": []})

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def impl(self) -> str:
        """Implementation of the kernels that this device is for."""
        return "triton" if self.device.type == "cuda" else "eager"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def say(self, line: str) -> None:
        """A line of the summary."""
        self.found["lines"].append(line)
        print(line, flush=True)
        self.save()

    def save(self) -> None:
        write_atomically(self.out / f"{self.name}.json", json.dumps(self.found, indent=1, default=str) + "\n")

    def of(self, part: str) -> dict[str, Any]:
        """Figures of an earlier part; none if it was not run."""
        path = self.out / f"{part}.json"
        return json.loads(path.read_text()) if path.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.gpu.stage", description=__doc__)
    parser.add_argument("part", choices=MODULES)
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    stage = Stage(args.part, args.out, time.monotonic() + args.seconds - _RESERVE, args.tiny)
    module, _, function = MODULES[args.part].partition(".")
    if stage.device.type == "cuda":
        torch.cuda.set_device(stage.device)
    getattr(importlib.import_module(f"pipeline.bench.gpu.{module}"), function)(stage)
    stage.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
