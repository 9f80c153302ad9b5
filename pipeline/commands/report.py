"""`poa report`: one HTML page about a run."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import local, path
from pipeline.commands.imports import heavy_imports
from pipeline.errors import UserError

HELP = "one HTML file about a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa report`."""
    parser.add_argument("directory", metavar="RUN", type=path, help="run directory, finished or not")
    parser.add_argument("--out", metavar="FILE", type=local, help="default: RUN/report.html")


def run(args: argparse.Namespace) -> int:
    """Write the report and say where."""
    from pipeline.files import require_writable, write_atomically

    with heavy_imports():
        from pipeline.report.page import report

    directory = Path(args.directory)
    if not directory.is_dir():
        raise UserError("no such run directory", str(directory), "name a directory that `poa train` wrote")
    out = Path(args.out) if args.out else directory / "report.html"
    if out.exists() and not out.is_file():
        raise UserError("this is no file that could be replaced", str(out), "name one with --out FILE")
    require_writable(out.parent, "name a file that can be written with --out")
    text = report(directory)
    write_atomically(out, text)
    print(f"{out} ({len(text) / 1e6:.1f} MB)")
    return 0
