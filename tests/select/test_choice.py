"""Limits, fronts and what is said if nothing fits, on networks written down by hand."""

from dataclasses import replace

import pytest

from pipeline.errors import UserError
from pipeline.select.choice import Network, excess, fits, front, on_any_front, ranked, require_fit
from pipeline.select.latency import Timing


def network(name: str, params: float, ms: float | None, knn: float | None, memory: float = 1e6) -> Network:
    quality = {} if knn is None else {"knn": knn, "loss": 1 - knn}
    return Network(name, "run", int(params), params / 1e6, 0.0, memory, seconds=ms and ms / 1000, quality=quality)


NETWORKS = [
    network("tiny", 1e6, 2.0, 0.5),
    network("slow", 2e6, 9.0, 0.6),
    network("quick", 3e6, 3.0, 0.6),
    network("worse", 4e6, 4.0, 0.55),
    network("good", 5e6, 8.0, 0.8),
    network("unknown", 1e6, 1.0, None),
]


def names(networks: list[Network]) -> list[str]:
    return [n.name for n in networks]


def test_a_front_holds_what_nothing_cheaper_equals():
    assert names(front(NETWORKS, "params", "knn")) == ["tiny", "slow", "good"]
    assert names(front(NETWORKS, "seconds", "knn")) == ["tiny", "quick", "good"]
    assert names(on_any_front(NETWORKS, "knn")) == ["good", "quick", "slow", "tiny"]


def test_less_is_better_for_a_loss():
    assert names(front(NETWORKS, "params", "loss")) == names(front(NETWORKS, "params", "knn"))
    assert ranked(NETWORKS, "loss")[0].name == "good"


def test_of_equals_the_quicker_comes_first_and_what_was_not_evaluated_is_left_out():
    assert names(ranked(NETWORKS, "knn")) == ["good", "quick", "slow", "worse", "tiny"]


def test_limits_are_kept_up_to_their_own_value():
    assert fits(NETWORKS[0], {"params": 1e6, "seconds": 0.002})
    assert not fits(NETWORKS[0], {"params": 1e6 - 1})
    assert not fits(NETWORKS[0], {"params": 1e6 - 1}, slack=1.01)  # what is counted needs none
    assert fits(NETWORKS[0], {"seconds": 0.00199}, slack=1.01)
    measured = replace(NETWORKS[0], timing=Timing(0.002, 0.002, 0.002, 5))
    assert not fits(measured, {"seconds": 0.00199}, slack=1.01)
    assert excess(NETWORKS[4], {"seconds": 0.004, "params": 1e7}) == {"seconds": 2.0, "params": 0.5}


def test_no_fit_names_the_tightest_limit_and_the_nearest_network():
    require_fit(NETWORKS, {"params": 1e6})
    with pytest.raises(UserError) as caught:
        require_fit(NETWORKS[:5], {"params": 0.9e6, "seconds": 0.001})
    line = str(caught.value)  # tiny misses its time by a factor of 2 and its parameters by 1.1
    assert "--max-ms 1 ms is the tightest" in line
    assert "tiny, takes 2 ms" in line
    assert "loosen --max-params" in line


def test_limits_that_each_network_keeps_but_none_together_are_refused():
    with pytest.raises(UserError, match=r"quick, takes 3 M \(--max-params\)"):
        require_fit(NETWORKS[:5][1:3], {"params": 2.5e6, "seconds": 0.003})


def test_json_has_milliseconds_and_quartiles():
    entry = network("a", 1e6, 2.0, 0.5)
    assert entry.as_json()["ms_quartiles"] is None
    entry.timing = Timing(0.002, 0.001, 0.004, 5)
    assert entry.as_json()["ms"] == 2.0
    assert entry.as_json()["ms_quartiles"] == [1.0, 4.0]
