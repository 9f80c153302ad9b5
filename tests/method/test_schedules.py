"""Schedules against rows computed by hand."""

import math

import pytest

from pipeline.config import parse_config
from pipeline.method.schedules import Rise, Schedules, cosine, course_text, linear

SMALL = {
    "optim": {
        "epochs": 10,
        "steps_per_epoch": 4,
        "base_lr": 1.0,
        "min_lr": 0.1,
        "warmup_epochs": 1,
        "schedule_fraction": 0.5,
        "ema": [0.9, 1.0],
        "weight_decay": [0.0, 0.4],
        "freeze_prototypes_epochs": 0.5,
    },
    "loss": {"ibot_start_epoch": 2, "teacher_temp": {"start": 0.04, "end": 0.07, "warmup_epochs": 1}},
}


def schedules_of(tree, global_batch):
    config = parse_config(tree)
    return Schedules(config.optim, config.loss, global_batch)


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 1.0), (42, 0.55), (23, 0.1 + 0.45 * (1 + math.cos(math.pi / 4)))],
)
def test_learning_rate_warms_up_to_its_end_point_and_follows_a_cosine_over_the_longer_horizon(step, lr):
    assert schedules_of(SMALL, 1024).at(step).lr == pytest.approx(lr)


@pytest.mark.parametrize(("batch", "peak"), [(1024, 1.0), (256, 0.5), (4096, 2.0)])
def test_learning_rate_scales_with_the_root_of_the_global_batch(batch, peak):
    assert schedules_of({**SMALL, "optim": {**SMALL["optim"], "min_lr": 0}}, batch).at(4).lr == peak


def test_other_values_at_chosen_steps():
    schedules = schedules_of(SMALL, 1024)
    rows = [schedules.at(step) for step in (0, 1, 2, 3, 7, 8, 40)]
    assert [r.teacher_temp for r in rows] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07, 0.07])
    assert [r.ibot for r in rows] == [False] * 5 + [True] * 2
    assert [r.prototypes_frozen for r in rows] == [True, True] + [False] * 5
    assert rows[0].momentum == pytest.approx(0.9)
    assert rows[-1].momentum == pytest.approx(0.95)  # halfway of 80 steps
    assert rows[-1].weight_decay == pytest.approx(0.2)
    assert rows[2].epoch == 0.5


def test_a_learning_rate_that_was_raised_in_the_middle_reaches_its_curve_over_the_warm_up():
    config = parse_config(SMALL)
    plain, raised = (Schedules(config.optim, config.loss, 1024, rise) for rise in (None, Rise(20, 0.2)))
    curve = [plain.at(step).lr for step in range(20, 26)]
    expected = [0.2, *(0.2 + (curve[i] - 0.2) * i / 4 for i in (1, 2, 3)), *curve[4:]]
    assert [raised.at(step).lr for step in range(20, 26)] == pytest.approx(expected)
    lowered = Schedules(config.optim, config.loss, 1024, Rise(20, 2.0))
    assert lowered.at(21).lr == curve[1]
    assert raised.course("lr", 20) == [(21, 0.2), (25, pytest.approx(curve[4])), (40, pytest.approx(plain.at(39).lr))]
    assert raised.course("lr", 60) == [(61, pytest.approx(plain.at(60).lr))]  # beyond the end of 40
    assert course_text([(21, 0.2), (40, 1e-5)]) == "0.2 at step 21, 1e-05 at step 40"


def test_the_papers_vit_run_ends_at_its_learning_rate():
    config = parse_config({})
    schedules = Schedules(config.optim, config.loss, 1600)
    assert schedules.at(7999).lr == schedules.at(8000).lr == pytest.approx(5.0e-3)
    assert schedules.at(config.optim.total_steps - 1).lr == pytest.approx(6.2e-4, rel=0.01)


def test_ramps_hold_their_ends():
    assert linear(0, 1.0, 2.0, 0) == linear(5, 1.0, 2.0, 1) == 2.0
    assert cosine(100, 1.0, 2.0, 100) == cosine(1000, 1.0, 2.0, 100) == 2.0
