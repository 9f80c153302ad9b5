"""Which keys may change when a run goes on, and from which step each value held."""

import json
import math
from functools import reduce

import pytest

from pipeline.config import parse_config
from pipeline.errors import UserError
from pipeline.method.schedules import Rise
from pipeline.run.experiment import CHANGEABLE_KEYS, FREE_KEYS, require_same_experiment, settle


def config(**sections):
    return parse_config({"data": {"batch_size": 8}, **sections})


def test_values_are_kept_with_the_step_from_which_they_hold(tmp_path):
    first = settle(config(), None, {"starts": []}, 0, tmp_path)
    assert first.changes == {}
    assert [entry["from_step"] for entry in first.history] == [0]
    assert set(first.history[0]["values"]) == set(CHANGEABLE_KEYS)

    lower = config(optim={"base_lr": 0.001, "weight_decay": (0.1, 0.4)})
    second = settle(lower, config(), {"settings": first.history}, 40, tmp_path)
    assert second.changes == {"optim.base_lr": (0.004, 0.001), "optim.weight_decay": ([0.04, 0.4], [0.1, 0.4])}
    assert [entry["from_step"] for entry in second.history] == [0, 40]

    same = settle(lower, lower, {"settings": second.history}, 50, tmp_path)
    assert (same.changes, same.history) == ({}, second.history)

    # back to step 30, before the change: steps 30 to 40 are done again with the new values
    back = settle(lower, lower, {"settings": second.history}, 30, tmp_path)
    assert back.changes == second.changes
    assert [entry["from_step"] for entry in back.history] == [0, 30]


def test_a_longer_run_warms_up_anew_and_says_how_its_schedules_go_on(tmp_path):
    optim = {"steps_per_epoch": 10, "warmup_epochs": 1, "base_lr": 1.0, "min_lr": 0.0, "schedule_fraction": 1.0}
    loss = {"teacher_temp": {"warmup_epochs": 1}}  # it is constant by then
    short, long = (config(optim={**optim, "epochs": epochs}, loss=loss) for epochs in (4, 8))
    first = settle(short, None, {"starts": []}, 0, tmp_path, 1024)
    manifest = {"settings": first.history, "global_batch": 1024}
    second = settle(long, short, manifest, 40, tmp_path, 1024)
    assert second.changes == {"optim.epochs": (4, 8)}
    assert second.rise == Rise(40, 0.0)
    assert set(second.courses) == {"lr", "weight_decay", "momentum"}
    before, now = second.courses["lr"]
    assert before == [(41, 0.0)]
    halfway = 0.5 * (1 + math.cos(math.pi * 40 / 70))  # after 50 of 80 steps, of which 10 are the first warm-up
    assert now == [
        (41, 0.0),
        (51, pytest.approx(halfway)),
        (80, pytest.approx(0.5 * (1 + math.cos(math.pi * 69 / 70)))),
    ]
    assert second.courses["weight_decay"][1][0] == (41, pytest.approx(0.22))  # halfway from 0.04 to 0.4

    # what the manifest keeps gives the same schedule at the next start, and a lower rate holds at once
    manifest = json.loads(json.dumps({"settings": second.history, "global_batch": 1024}))
    again = settle(long, long, manifest, 45, tmp_path, 1024)
    assert (again.rise, again.changes, again.courses) == (second.rise, {}, {})
    lower = settle(config(optim={**optim, "epochs": 8, "base_lr": 0.1}, loss=loss), long, manifest, 60, tmp_path, 1024)
    assert lower.rise == second.rise
    assert lower.courses["lr"][1][0][1] == pytest.approx(0.1 * lower.courses["lr"][0][0][1])


def test_every_key_that_is_marked_exists_and_no_other_may_change(tmp_path):
    tree = parse_config({}).model_dump()
    for key in (*FREE_KEYS, *CHANGEABLE_KEYS):
        reduce(lambda node, name: node[name], key.split("."), tree)
    named = (
        "epochs",
        "base_lr",
        "layer_decay",
        "patch_embed_lr_scale",
        "min_lr",
        "warmup_epochs",
        "schedule_fraction",
        "weight_decay",
        "ema",
    )
    assert {f"optim.{name}" for name in named} <= set(CHANGEABLE_KEYS)
    assert {"loss.ibot_weight", "loss.teacher_temp.end", "data.local_crops.scale", "data.blur"} <= set(CHANGEABLE_KEYS)
    fixed = ("model.family", "model.width.max", "heads.prototypes", "data.seed", "data.window", "optim.steps_per_epoch")
    fixed += ("model.mlp_ratio.max", "model.init_order", "model.block_importance", "loss.centering")
    assert not set(fixed) & {*FREE_KEYS, *CHANGEABLE_KEYS}


def test_other_keys_may_not_change(tmp_path):
    require_same_experiment(config(), config(optim={"base_lr": 1.0, "max_bad_steps": 3}), tmp_path)
    require_same_experiment(config(), config(engine={"precision": "fp32"}), tmp_path)
    with pytest.raises(UserError, match=r"another experiment: optim\.steps_per_epoch is 800 there and 20 here"):
        require_same_experiment(config(), config(optim={"steps_per_epoch": 20}), tmp_path)


def test_koleo_seeks_its_neighbours_among_as_many_images_as_at_the_first_start(tmp_path):
    first = settle(config(), None, {"starts": []}, 0, tmp_path)
    assert first.config.loss.koleo_group == 8
    half_the_ranks = config(data={"batch_size": 16})
    second = settle(half_the_ranks, config(), {"settings": first.history}, 10, tmp_path)
    assert (second.config.loss.koleo_group, second.changes) == (8, {})

    twice_the_ranks = {"data": {"batch_size": 4}}
    with pytest.raises(
        UserError, match=r"among 8 images of a rank, which has 4 now.*loss\.koleo_group to a divisor of 4"
    ):
        settle(config(**twice_the_ranks), config(), {"settings": first.history}, 10, tmp_path)
    chosen = config(**twice_the_ranks, loss={"koleo_group": 4})
    third = settle(chosen, config(), {"settings": first.history}, 10, tmp_path)
    assert (third.config.loss.koleo_group, third.changes) == (4, {"loss.koleo_group": (8, 4)})
    unused = settle(
        config(**twice_the_ranks, loss={"koleo_weight": 0}), None, {"settings": first.history}, 10, tmp_path
    )
    assert unused.config.loss.koleo_group is None


def test_a_run_of_a_version_that_kept_no_values_goes_on_with_those_of_its_files(tmp_path):
    manifest = {"starts": [{"step": 0, "world_size": 2}], "global_batch": 16}
    found = settle(config(data={"batch_size": 16}, optim={"base_lr": 0.001}), config(), manifest, 10, tmp_path)
    assert found.config.loss.koleo_group == 8
    assert found.changes == {"optim.base_lr": (0.004, 0.001)}
    assert [entry["from_step"] for entry in found.history] == [0, 10]


def test_a_manifest_that_kept_fewer_keys_lets_the_others_be_as_they_were(tmp_path):
    manifest = {"settings": [{"from_step": 0, "values": {"optim.base_lr": 0.001, "loss.koleo_group": 4}}]}
    there = config(optim={"base_lr": 0.001, "epochs": 30})
    same = settle(there, there, manifest, 10, tmp_path)
    assert (same.config.loss.koleo_group, same.changes) == (4, {})
    longer = settle(config(optim={"base_lr": 0.001, "epochs": 60}), there, manifest, 10, tmp_path)
    assert longer.changes == {"optim.epochs": (30, 60)}
