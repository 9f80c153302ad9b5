"""The `poa` command: parses, then hands over to the module of `pipeline.commands` that bears the command's name."""

import argparse
import difflib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pipeline.commands import demo, doctor, eval, extract, plan, report, shards, subnets, train, watch
from pipeline.errors import UserError

EXIT_USER_ERROR = 2
COMMANDS: dict[str, Any] = {
    module.__name__.rpartition(".")[2]: module
    for module in (train, doctor, plan, shards, subnets, extract, eval, report, watch, demo)
}
"""In the order of `poa --help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the process's exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks must not end a command
            stream.reconfigure(errors="backslashreplace")
    try:
        args, extra = _parser().parse_known_args(argv)
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
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def _take_overrides(args: argparse.Namespace, extra: list[str]) -> None:
    """Overrides may stand behind options, where argparse does not look for them."""
    for word in extra:
        if word.startswith("-") or not hasattr(args, "overrides"):
            near = difflib.get_close_matches(word, re.findall(r"--[\w-]+", args.parser.format_help()), n=1)
            fix = f"did you mean {near[0]}?" if near else f"see `{args.parser.prog} --help`"
            raise UserError(f"unknown argument {word!r}", "command line", fix)
        args.overrides.append(word)
