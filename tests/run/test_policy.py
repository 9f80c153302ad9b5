"""What follows from a step."""

import pytest

from pipeline.config import parse_config
from pipeline.run.policy import Decision, End, Policy, after

POLICY = Policy(last_step=20, log_every=4, save_every=6, evaluate_every=5, max_bad_steps=3)


@pytest.mark.parametrize(
    ("step", "bad_in_a_row", "stop", "expected"),
    [
        (1, 0, False, Decision(evaluate=False, log=False, save=False, end=None)),
        (4, 0, False, Decision(evaluate=False, log=True, save=False, end=None)),
        (5, 0, False, Decision(evaluate=True, log=False, save=False, end=None)),
        (6, 0, False, Decision(evaluate=False, log=False, save=True, end=None)),
        (7, 1, False, Decision(evaluate=False, log=True, save=False, end=None)),
        (7, 3, False, Decision(evaluate=False, log=True, save=True, end=End.FAILED)),
        (7, 0, True, Decision(evaluate=False, log=False, save=True, end=End.STOPPED)),
        (7, 3, True, Decision(evaluate=False, log=True, save=True, end=End.FAILED)),
        (20, 0, False, Decision(evaluate=True, log=True, save=True, end=End.DONE)),
        (20, 0, True, Decision(evaluate=True, log=True, save=True, end=End.DONE)),
        (20, 3, False, Decision(evaluate=True, log=True, save=True, end=End.FAILED)),
    ],
)
def test_decision_after_a_step(step, bad_in_a_row, stop, expected):
    assert after(POLICY, step, bad_in_a_row, stop) == expected


def test_a_run_without_evaluation_never_evaluates():
    policy = Policy(last_step=20, log_every=4, save_every=6, evaluate_every=None, max_bad_steps=3)
    assert not any(after(policy, step, 0, False).evaluate for step in range(1, 21))


@pytest.mark.parametrize(("max_steps", "last"), [(None, 40), (7, 7), (100, 40)])
def test_a_run_ends_with_its_schedule_or_earlier(max_steps, last):
    config = parse_config({"optim": {"epochs": 20, "steps_per_epoch": 2}, "run": {"max_steps": max_steps}})
    assert Policy.of(config).last_step == last
