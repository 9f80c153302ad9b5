"""Spearman's rho against numbers worked out by hand and by the formula of its interval."""

import math

import pytest

from pipeline.select.correlation import spearman


def test_rho_and_interval_by_hand():
    found = spearman([1, 2, 3, 4, 5], [10, 30, 20, 40, 50])
    assert found.rho == pytest.approx(1 - 6 * 2 / (5 * 24))  # two ranks differ by one each
    half = 1.959964 * math.sqrt((1 + 0.9**2 / 2) / 2)
    assert (found.low, found.high) == pytest.approx(
        (math.tanh(math.atanh(0.9) - half), math.tanh(math.atanh(0.9) + half))
    )
    assert "+0.90" in str(found)


def test_the_interval_lies_within_one_even_where_all_ranks_agree():
    found = spearman(range(9), range(9))
    assert found.rho == pytest.approx(1)
    assert 0.9 < found.low <= found.high <= 1


def test_few_networks_have_no_interval_and_equal_scores_no_ranking():
    assert math.isnan(spearman([1, 2, 3], [1, 2, 3]).low)
    assert "too few" in str(spearman([1, 2, 3], [1, 3, 2]))
    assert "no ranking" in str(spearman([1, 1, 1], [1, 2, 3]))
    assert spearman([1, 1, 1], [1, 2, 3]).as_json() == {"rho": None, "low": None, "high": None, "networks": 3}
