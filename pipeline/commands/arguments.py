"""Arguments that several commands share."""

import argparse


def add_config(parser: argparse.ArgumentParser, metavar: str = "CONFIG") -> None:
    """An experiment file and overrides of its keys."""
    parser.add_argument("config", metavar=metavar, help="experiment file")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="e.g. optim.base_lr=1e-3")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output")
