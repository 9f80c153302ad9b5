"""`poa demo`: the whole job, small."""

import argparse
from pathlib import Path

from pipeline.commands.arguments import local

HELP = "the whole job on embedded images, in a few minutes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa demo`."""
    parser.add_argument(
        "--dir", type=local, default="runs/demo", metavar="DIR", help="where to put it (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run it."""
    from pipeline.demo import run_demo

    return run_demo(Path(args.dir))
