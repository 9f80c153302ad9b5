"""How budgets are read."""

import argparse

import pytest

from pipeline.cli import _parser


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        *(("params", "25M", 25e6), ("params", "1.5b", 1.5e9), ("params", "4 K", 4000.0)),
        *(("memory", "500", 500.0), ("memory", "500B", 500.0), ("memory", "2gb", 2e9), ("memory", "2G", 2e9)),
        *(("gflops", ".5", 0.5), ("ms", "1e-3", 0.001)),
    ],
)
def test_a_budget_is_read_in_the_units_of_its_quantity(option, text, value):
    args = _parser().parse_args(["select", "run", f"--max-{option}", text])
    assert getattr(args, f"max_{option}") == value


@pytest.mark.parametrize(
    ("option", "text"),
    [("ms", "5K"), ("ms", "5KB"), ("gflops", "4M"), ("params", "5KB"), ("memory", "4MiB"), ("memory", "4BB")],
)
def test_units_of_another_quantity_are_refused(option, text):
    read = next(a for a in _actions("select") if a.dest == f"max_{option}").type
    with pytest.raises(argparse.ArgumentTypeError, match="is no positive number such as"):
        read(text)


def _actions(command):
    (choices,) = (action.choices for action in _parser()._actions if isinstance(action.choices, dict))
    return choices[command]._actions
