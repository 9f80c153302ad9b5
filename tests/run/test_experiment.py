"""Which keys may change when a run goes on, and from which step each value held."""

import pytest

from pipeline.config import parse_config
from pipeline.errors import UserError
from pipeline.run.experiment import CHANGEABLE_KEYS, require_same_experiment, settle


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


def test_other_keys_may_not_change(tmp_path):
    require_same_experiment(config(), config(optim={"base_lr": 1.0, "max_bad_steps": 3}), tmp_path)
    require_same_experiment(config(), config(engine={"precision": "fp32"}), tmp_path)
    with pytest.raises(UserError, match=r"another experiment: optim\.epochs is 346 there and 20 here"):
        require_same_experiment(config(), config(optim={"epochs": 20}), tmp_path)


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
