"""`poa train`: train a run, or resume it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.arguments import add_config, local, path
from pipeline.commands.imports import heavy_imports

if TYPE_CHECKING:
    from pipeline.config import ExperimentConfig

HELP = "train a run, or resume it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `poa train`."""
    add_config(parser)
    parser.add_argument("--run-dir", metavar="DIR", type=local, help="instead of run.dir of the config")
    parser.add_argument(
        "--fork-from", metavar="RUN[@STEP]", type=path, help="begin in a new --run-dir from a checkpoint of another run"
    )
    parser.add_argument("--dry-run", action="store_true", help="show config, grid and memory estimate; train nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress line")


def run(args: argparse.Namespace) -> int:
    """Train; see `pipeline.run.loop.train` for the exit codes."""
    from pipeline.config import load_config

    config = load_config(args.config, args.overrides, args.run_dir)
    if args.dry_run:
        from pipeline.plan.plan import describe

        print(describe(config))
        return 0
    _look_for_shards(config)
    from pipeline.run.slurm_job import stop_signals

    with stop_signals() as stop_requested:
        with heavy_imports():
            from pipeline.run.fork import Fork
            from pipeline.run.loop import train

        fork = Fork.read(args.fork_from, config.run.dir) if args.fork_from else None
        return train(config, quiet=args.quiet, stop_requested=stop_requested, fork=fork)


def _look_for_shards(config: "ExperimentConfig") -> None:
    """A slip in the names of shards on a disk is told before what training imports.

    Only to one who starts a run by hand: a run that is there may be complete and want no data, ranks tell each other
    what one of them misses, and a job tells its batch script.
    """
    from pipeline.data.patterns import list_shards, patterns_of
    from pipeline.data.remote.address import is_remote
    from pipeline.engine.launch import launch
    from pipeline.run.slurm_job import Job

    train = config.data.train
    alone = not launch().together and Job.from_environment() is None
    if alone and not Path(config.run.dir).exists() and not any(map(is_remote, patterns_of(train))):
        list_shards(train)
