"""`poa subnets`: the sub-networks of a config or run."""

import argparse
import json
from pathlib import Path

from pipeline.commands.arguments import add_config, add_json

HELP = "list the sub-networks of a config or run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa subnets`."""
    add_config(parser, "CONFIG|RUN")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """List them."""
    from pipeline.config import load_config
    from pipeline.plan.subnets import subnet_rows, subnet_table

    path = Path(args.config)
    config = load_config(path / "config.yaml" if path.is_dir() else path, args.overrides)
    print(json.dumps(subnet_rows(config)) if args.json else subnet_table(config))
    return 0
