"""The `poa` command: parses, then imports what the subcommand needs."""

import argparse
import difflib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from pipeline.errors import UserError

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the process's exit code."""
    try:
        parser = _parser()
        args, extra = parser.parse_known_args(argv)
        _take_overrides(args, extra)
        return args.run(args)
    except UserError as error:
        if not (error.shared and os.environ.get("RANK", "0") != "0"):  # once, not once per rank
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # `poa subnets ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Wrong usage is a user error like any other: one line. Options are not guessed from their beginnings."""

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UserError(message, "command line", f"see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="poa", description="Pre-train a vision backbone once, ship every size of it.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    train = commands.add_parser("train", help="train a run, or resume it")
    _add_config(train)
    train.add_argument("--run-dir", metavar="DIR", help="instead of run.dir of the config")
    train.add_argument("--dry-run", action="store_true", help="show config, grid and memory estimate; train nothing")
    train.add_argument("--quiet", action="store_true", help="no progress line")
    train.set_defaults(run=_train)

    doctor = commands.add_parser("doctor", help="check data, disk, libraries and memory before a job")
    _add_config(doctor)
    doctor.add_argument("--gpus", type=int, metavar="N", help="ranks of the job (default: those at hand)")
    doctor.add_argument("--json", action="store_true", help="machine-readable output")
    doctor.set_defaults(run=_doctor)

    plan = commands.add_parser("plan", help="what a run on N GPUs takes: memory, traffic, days")
    _add_config(plan)
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the run")
    plan.add_argument("--gpu", choices=("a100", "h100", "h200"), default="h100", help="default: %(default)s")
    plan.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of the peak that the step reaches (default: %(default)s)",
    )
    plan.add_argument("--json", action="store_true", help="machine-readable output")
    plan.set_defaults(run=_plan)

    from pipeline.data import cli as shards

    shards.add_arguments(commands.add_parser("shards", help="build, index, verify or describe shards"))

    subnets = commands.add_parser("subnets", help="list the sub-networks of a config or run")
    _add_config(subnets, "CONFIG|RUN")
    subnets.add_argument("--json", action="store_true", help="machine-readable output")
    subnets.set_defaults(run=_subnets)

    from pipeline import extract, watch
    from pipeline.evaluate import cli as evaluate
    from pipeline.report import cli as report

    extract.add_arguments(commands.add_parser("extract", help="cut sub-networks out as plain timm models"))
    evaluate.add_arguments(commands.add_parser("eval", help="k-NN or linear accuracy of sub-networks"))
    report.add_arguments(commands.add_parser("report", help="one HTML file about a run"))
    watch.add_arguments(commands.add_parser("watch", help="the dashboard of a run, over Prometheus"))

    demo = commands.add_parser("demo", help="the whole job on embedded images, in a few minutes")
    demo.add_argument("--dir", default="runs/demo", metavar="DIR", help="where to put it (default: %(default)s)")
    demo.set_defaults(run=_demo)
    return parser


def _add_config(parser: argparse.ArgumentParser, metavar: str = "CONFIG") -> None:
    parser.add_argument("config", metavar=metavar, help="experiment file")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="e.g. optim.base_lr=1e-3")


def _take_overrides(args: argparse.Namespace, extra: list[str]) -> None:
    """Overrides may stand behind options, where argparse does not look for them."""
    for word in extra:
        if word.startswith("-") or not hasattr(args, "overrides"):
            options = [
                o
                for o in (
                    "--run-dir",
                    "--dry-run",
                    "--gpus",
                    "--gpu",
                    "--mfu",
                    "--json",
                    "--quiet",
                    "--subnet",
                    "--out",
                )
                if word != o
            ]
            near = difflib.get_close_matches(word, options, n=1)
            raise UserError(
                f"unknown argument {word!r}", "command line", f"did you mean {near[0]}?" if near else "see poa --help"
            )
        args.overrides.append(word)


@contextmanager
def _heavy_imports() -> Iterator[None]:
    """Keep Python's cycle collector away from what imports make, now, while the command runs, and at exit.

    These are more than half a million objects that live as long as the process. Looking for garbage among them takes a
    fifth of the time of the imports, and as long again when the interpreter shuts down.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _train(args: argparse.Namespace) -> int:
    from pipeline.config import load_config

    overrides = list(args.overrides)
    if args.run_dir is not None:
        overrides.append(f"run.dir={args.run_dir}")
    config = load_config(args.config, overrides)
    if args.dry_run:
        from pipeline.plan import describe

        print(describe(config))
        return 0
    from pipeline.job import stop_signals

    with stop_signals() as stop_requested:
        with _heavy_imports():
            from pipeline.train import train

        return train(config, quiet=args.quiet, stop_requested=stop_requested)


def _doctor(args: argparse.Namespace) -> int:
    from pipeline.doctor import run

    return run(args)


def _plan(args: argparse.Namespace) -> int:
    from pipeline.plan import run

    return run(args)


def _subnets(args: argparse.Namespace) -> int:
    from pathlib import Path

    from pipeline.config import load_config
    from pipeline.plan import subnet_rows, subnet_table

    path = Path(args.config)
    config = load_config(path / "config.yaml" if path.is_dir() else path, args.overrides)
    if args.json:
        import json

        print(json.dumps(subnet_rows(config)))
    else:
        print(subnet_table(config))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from pathlib import Path

    from pipeline.demo import run_demo

    return run_demo(Path(args.dir))
