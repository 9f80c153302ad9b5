"""What follows from a step."""

import pytest

from pipeline.config import parse_config
from pipeline.run.policy import Decision, End, Policy, Save, after, may_run_ahead

POLICY = Policy(last_step=20, log_every=4, save_every=6, evaluate_every=5, max_bad_steps=3)


@pytest.mark.parametrize(
    ("step", "bad_in_a_row", "stop", "expected"),
    [
        (1, 0, False, Decision(evaluate=False, log=False, save=None, end=None)),
        (4, 0, False, Decision(evaluate=False, log=True, save=None, end=None)),
        (5, 0, False, Decision(evaluate=True, log=False, save=None, end=None)),
        (6, 0, False, Decision(evaluate=False, log=False, save=Save.NOW, end=None)),
        (6, 1, False, Decision(evaluate=False, log=True, save=Save.GOOD, end=None)),
        (7, 1, False, Decision(evaluate=False, log=True, save=None, end=None)),
        (6, 3, False, Decision(evaluate=False, log=True, save=Save.GOOD, end=End.GIVE_UP)),
        (7, 3, False, Decision(evaluate=False, log=True, save=Save.GOOD, end=End.GIVE_UP)),
        (7, 0, True, Decision(evaluate=False, log=False, save=Save.NOW, end=End.STOPPED)),
        (7, 2, True, Decision(evaluate=False, log=True, save=Save.GOOD, end=End.STOPPED)),
        (7, 3, True, Decision(evaluate=False, log=True, save=Save.GOOD, end=End.GIVE_UP)),
        (20, 0, False, Decision(evaluate=True, log=True, save=Save.NOW, end=End.DONE)),
        (20, 0, True, Decision(evaluate=True, log=True, save=Save.NOW, end=End.DONE)),
        (20, 2, False, Decision(evaluate=True, log=True, save=Save.NOW, end=End.DONE)),
        (20, 3, False, Decision(evaluate=True, log=True, save=Save.GOOD, end=End.GIVE_UP)),
    ],
)
def test_decision_after_a_step(step, bad_in_a_row, stop, expected):
    assert after(POLICY, step, bad_in_a_row, stop) == expected


def test_no_step_is_underway_when_the_weights_of_the_one_before_are_wanted():
    ahead = {(begun, bad): may_run_ahead(POLICY, begun, bad) for begun in range(1, 21) for bad in range(3)}
    for (begun, bad), allowed in ahead.items():
        decisions = [after(POLICY, begun, outcome, False) for outcome in (0, bad + 1)]
        if allowed:
            assert all((d.evaluate, d.save, d.end) == (False, None, None) for d in decisions)
    assert [begun for begun in range(1, 21) if not ahead[begun, 1]] == [5, 6, 10, 12, 15, 18, 20]
    assert not any(ahead[begun, 2] for begun in range(1, 21))  # the third bad one would be the last


def test_a_run_without_evaluation_never_evaluates():
    policy = Policy(last_step=20, log_every=4, save_every=6, evaluate_every=None, max_bad_steps=3)
    assert not any(after(policy, step, 0, False).evaluate for step in range(1, 21))


@pytest.mark.parametrize(("max_steps", "last"), [(None, 40), (7, 7), (100, 40)])
def test_a_run_ends_with_its_schedule_or_earlier(max_steps, last):
    config = parse_config({"optim": {"epochs": 20, "steps_per_epoch": 2}, "run": {"max_steps": max_steps}})
    assert Policy.of(config).last_step == last


def test_exit_codes_are_those_that_scripts_wait_for():
    assert {end: end.exit_code for end in End} == {End.DONE: 0, End.STOPPED: 75, End.TRY_AGAIN: 1, End.GIVE_UP: 1}
