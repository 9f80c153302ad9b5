"""`poa doctor`: what would make a job fail, found before it waits in the queue."""

import argparse
import json

from pipeline.commands.arguments import LARGEST_JOB, add_config, add_json, whole
from pipeline.commands.imports import heavy_imports

HELP = "check data, disk, libraries and memory before a job"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa doctor`."""
    add_config(parser)
    parser.add_argument(
        "--gpus", type=whole(1, LARGEST_JOB), metavar="N", help="ranks of the job (default: those at hand)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check, alone or on every rank; 1 if anything fails."""
    from pipeline.config import load_config

    config = load_config(args.config, args.overrides)
    with heavy_imports():
        from pipeline.engine import distributed
        from pipeline.plan.doctor import examine, table

    ranks = distributed.initialize(120)
    try:
        checks = examine(config, ranks, args.gpus or ranks.world_size)
    finally:
        distributed.shut_down()
    if ranks.is_main:
        print(json.dumps([check._asdict() for check in checks]) if args.json else table(checks))
    return int(any(check.status == "fail" for check in checks))
