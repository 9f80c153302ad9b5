"""`poa plan`: what a run on N GPUs takes."""

import argparse
import json

from pipeline.commands.arguments import LARGEST_JOB, add_config, add_json, whole
from pipeline.errors import UserError

HELP = "what a run on N GPUs takes: memory, traffic, days"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa plan`."""
    add_config(parser)
    parser.add_argument("--gpus", type=whole(1, LARGEST_JOB), required=True, metavar="N", help="ranks of the run")
    parser.add_argument("--gpu", choices=("a100", "h100", "h200"), default="h100", help="default: %(default)s")
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of the peak that the step reaches (default: %(default)s)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    from pipeline.config import load_config
    from pipeline.plan.plan import plan, plan_text

    if not 0 < args.mfu <= 1:
        raise UserError(f"a utilization of {args.mfu:g}", "--mfu", "name a share within (0, 1], such as 0.4")
    result = plan(load_config(args.config, args.overrides), args.gpus, args.gpu, args.mfu)
    print(json.dumps(result) if args.json else plan_text(result))
    return 0
