"""`poa report`: one HTML page about a run."""

import argparse
from pathlib import Path

HELP = "one HTML file about a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa report`."""
    parser.add_argument("directory", metavar="RUN", help="run directory, finished or not")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html")


def run(args: argparse.Namespace) -> int:
    """Write the report and say where."""
    from pipeline.files import write_atomically
    from pipeline.report.page import report

    directory = Path(args.directory)
    out = Path(args.out) if args.out else directory / "report.html"
    text = report(directory)
    write_atomically(out, text)
    print(f"{out} ({len(text) / 1e6:.1f} MB)")
    return 0
