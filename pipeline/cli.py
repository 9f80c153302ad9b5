"""The `poa` command: parses, then hands over to the module of `pipeline.commands` that bears the command's name."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from io import UnsupportedOperation
from typing import Any, NoReturn

from pipeline.commands import (
    demo,
    doctor,
    embed,
    eval,
    extract,
    plan,
    publish,
    report,
    select,
    shards,
    subnets,
    train,
    watch,
)
from pipeline.commands.signals import Stopped, ended_by_signals
from pipeline.commands.streams import stdout_is_broken, steady_streams
from pipeline.errors import UserError, of_a_package, of_the_system, short
from pipeline.run.slurm_job import speaks_for_all

EXIT_USER_ERROR = 2
COMMANDS: dict[str, Any] = {
    module.__name__.rpartition(".")[2]: module
    for module in (train, doctor, plan, shards, subnets, select, extract, publish, eval, embed, report, watch, demo)
}
"""In the order of `poa --help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the process's exit code."""
    speaks = speaks_for_all()  # asked now: a command may change the environment
    with steady_streams(), ended_by_signals():
        try:
            args, extra = _parser().parse_known_args(argv)
            _take_overrides(args, extra)
            _require_place()
            code = args.run(args)
            sys.stdout.flush()
            return code
        except UserError as error:
            if speaks or not error.shared:  # once, not once per rank
                print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        except UnsupportedOperation:  # an OSError by name, a mistake in the code by nature
            raise
        except OSError as error:
            if stdout_is_broken() and isinstance(error, BrokenPipeError):  # `poa subnets ... | head`
                return 0
            print(f"error: {of_the_system(error)}", file=sys.stderr)
            return EXIT_USER_ERROR
        except ImportError as error:
            print(f"error: {of_a_package(error)}", file=sys.stderr)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Stopped as stop:
            print(f"stopped by {stop.name}", file=sys.stderr)
            return int(stop.code or 0)


def _require_place() -> None:
    """A working directory that is gone ends libraries in ways of their own (MKL's says that torch cannot be loaded)."""
    try:
        os.getcwd()
    except OSError as error:
        what = f"the working directory cannot be used: {error.strerror}"
        raise UserError(what, os.environ.get("PWD", "."), "change to one that is there") from error


class _Parser(argparse.ArgumentParser):
    """Wrong usage is a user error like any other: one line. Options are not guessed from their beginnings."""

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False, **settings})
        for action in (None, "store"):
            self.register("action", action, _Once)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        """As ever; the innermost parser that had a word stays known as `parser`, for its options to be suggested."""
        found, extra = super().parse_known_args(args, namespace)
        found.parser = getattr(found, "parser", self)
        return found, extra

    def error(self, message: str) -> NoReturn:
        raise UserError(message, "command line", f"see `{self.prog} --help`")


class _Once(argparse._StoreAction):
    """An option with a value: of two, one would be lost in silence."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """As ever, the first time."""
        given = vars(namespace).setdefault("given", set())
        if option_string is not None and self.dest in given:
            several = ", with all its values behind it" if self.nargs == "+" else ""
            raise UserError(f"{option_string} is given twice", "command line", f"give it once{several}")
        given.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="poa", description="Pre-train a vision backbone once, ship every size of it.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _take_overrides(args: argparse.Namespace, extra: list[str]) -> None:
    """Overrides may stand behind options, where argparse does not look for them."""
    for word in extra:
        if word.startswith("-") or not hasattr(args, "overrides"):
            near = difflib.get_close_matches(word, re.findall(r"--[\w-]+", args.parser.format_help()), n=1)
            fix = f"did you mean {near[0]}?" if near else f"see `{args.parser.prog} --help`"
            raise UserError(f"unknown argument {short(word)}", "command line", fix)
        args.overrides.append(word)
