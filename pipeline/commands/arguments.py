"""Arguments that several commands share, and the kinds of their values."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

LARGEST_JOB = 1_000_000  # GPUs


def add_config(parser: argparse.ArgumentParser, metavar: str = "CONFIG") -> None:
    """An experiment file and overrides of its keys."""
    parser.add_argument("config", metavar=metavar, type=path, help="experiment file")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="e.g. optim.base_lr=1e-3")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def path(text: str) -> str:
    """A path: as it is if it exists, else with `~` and `$NAME` filled in, which no shell does behind `--out=`."""
    from pipeline.config.section import expand_path

    return _filled_in(text, expand_path)


def local(text: str) -> str:
    """As `path`, for what is written: no address."""
    from pipeline.config.section import expand_local

    return _filled_in(text, expand_local)


def _filled_in(text: str, expand: Callable[[str], str]) -> str:
    try:
        return text if Path(text).exists() and text else expand(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(getattr(error, "strerror", None) or str(error)) from error


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number from `low` to `high`, in plain digits."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text, re.ASCII) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from {low} to {high}")
        return int(text)

    return read
