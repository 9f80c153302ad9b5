import itertools

import numpy as np
import pytest

from pipeline.data.order import SampleOrder, cut, lanes_of, positions_of

SIZES = np.array([5, 1, 7, 3, 4])


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_every_epoch_holds_every_sample_once_in_its_own_order(window: int) -> None:
    order = SampleOrder(SIZES, window, seed=3)
    epochs = [[order(20 * epoch + place) for place in range(20)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_samples_stay_within_their_window_of_shards() -> None:
    order = SampleOrder(np.full(6, 10), window=2, seed=0)
    shards = [order(place) // 10 for place in range(60)]
    windows = [set(shards[i : i + 20]) for i in range(0, 60, 20)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert set.union(*windows) == set(range(6))
    assert sum(one != two for one, two in itertools.pairwise(shards[:20])) > 3, "the shards of a window are mixed"


def test_windows_hold_other_shards_in_other_epochs() -> None:
    order = SampleOrder(np.full(6, 10), window=2, seed=0)
    windows = [
        {frozenset(order(60 * epoch + place) // 10 for place in range(i, i + 20)) for i in range(0, 60, 20)}
        for epoch in range(4)
    ]
    assert len({frozenset(window) for window in windows}) > 1


def test_order_is_a_pure_function_of_seed_and_position() -> None:
    forwards, backwards = SampleOrder(SIZES, 2, seed=5), SampleOrder(SIZES, 2, seed=5)
    expected = [forwards(place) for place in range(200)]
    assert [backwards(place) for place in reversed(range(200))] == expected[::-1]
    other = SampleOrder(SIZES, 2, seed=6)
    assert [other(place) for place in range(200)] != expected


@pytest.mark.parametrize(("lanes", "window"), [(2, 1), (3, 2), (5, 100), (8, 2), (20, 1)])
def test_lanes_hold_every_sample_once_per_epoch_too(lanes: int, window: int) -> None:
    order = SampleOrder(np.array([5, 1, 7, 3, 4, 9, 2, 6]), window, seed=3, lanes=lanes)
    epochs = [[order(37 * epoch + place) for place in range(37)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = SampleOrder(np.array([5, 1, 7, 3, 4, 9, 2, 6]), window, seed=3, lanes=lanes)
    assert [again(place) for place in reversed(range(74))] == (epochs[0] + epochs[1])[::-1]


def test_lane_reads_the_same_few_pieces_in_every_epoch() -> None:
    """4 lanes of 32 pieces of 10 samples: 8 pieces each, since 320 = 4 x 80 shifts no border."""
    order = SampleOrder(np.full(32, 10), window=3, seed=1, lanes=4)
    for lane in range(4):
        pieces = [
            {order(position) // 10 for position in range(320 * epoch + lane, 320 * (epoch + 1), 4)}
            for epoch in range(3)
        ]
        assert len(pieces[0]) == 8
        assert pieces[0] == pieces[1] == pieces[2]


@pytest.mark.parametrize("lanes", [1, 4, 6, 7])
def test_any_number_of_ranks_shares_the_same_batch(lanes: int) -> None:
    whole = positions_of(240, 24, 0, 1, lanes, begin=3)
    assert sorted(whole) == list(range(240, 264))
    for ranks in (2, 3, 8):
        parts = [positions_of(240, 24 // ranks, rank, ranks, lanes, begin=3) for rank in range(ranks)]
        assert np.concatenate(parts).tolist() == whole.tolist()
    assert (np.diff((whole - 3) % lanes) >= 0).all()


def test_portions_of_lanes() -> None:
    assert lanes_of(0, 1, 3) == {0: 1, 1: 1, 2: 1}
    assert lanes_of(1, 4, 2) == {0: 0.5}
    shares = [lanes_of(rank, 5, 2) for rank in range(5)]
    assert shares[2] == pytest.approx({0: 0.2, 1: 0.2})
    assert [sum(share[lane] for share in shares if lane in share) for lane in (0, 1)] == pytest.approx([1, 1])


@pytest.mark.parametrize("lanes", [1, 3])
def test_pieces_ahead_are_those_that_come(lanes: int) -> None:
    sizes = np.array([5, 1, 7, 3, 4, 9, 2, 6])
    order = SampleOrder(sizes, window=2, seed=3, lanes=lanes)
    ends = np.cumsum(sizes)
    for lane in range(lanes):
        positions = range(lane, 3 * 37, lanes)
        windows = [order.ahead(position, {lane: 1.0}) for position in positions]
        for position, (now, _) in zip(positions, windows, strict=True):
            assert int(np.searchsorted(ends, order(position), side="right")) in [piece for piece, _ in now]
            assert order(position) in order.near(position)
        changes = [(one, other) for one, other in itertools.pairwise(windows) if one != other]
        assert len(changes) >= 5
        assert all(one[1] == other[0] for one, other in changes)


def test_portions_tell_how_much_of_a_piece_is_read() -> None:
    order = SampleOrder(np.array([10, 20, 30]), window=9, seed=0, lanes=2)  # a border at 30 of 60 along the line
    everyone = {piece: portion for window in order.ahead(0, {0: 1.0, 1: 1.0}) for piece, portion in window}
    assert set(everyone.values()) == {1.0}
    first, second = (dict(order.ahead(lane, {lane: 1.0})[0]) for lane in (0, 1))
    read = np.bincount([np.searchsorted([10, 30, 60], order(p), side="right") for p in range(0, 60, 2)], minlength=3)
    assert [first.get(piece, 0) for piece in range(3)] == pytest.approx(read / [10, 20, 30])
    total = [first.get(piece, 0) + second.get(piece, 0) for piece in range(3)]
    assert total == pytest.approx([1, 1, 1])


def test_shards_are_cut_into_equal_runs_of_records() -> None:
    megabyte = 1 << 20
    assert cut([10, 20], np.array([3, 4]), 0).tolist() == [3, 4]
    assert cut([10 * megabyte, 100, 3 * megabyte], np.array([11, 5, 2]), 4).tolist() == [6, 5, 5, 2]
    assert cut([50 * megabyte], np.array([3]), 1).tolist() == [1, 1, 1], "a piece holds a record at least"


def test_more_lanes_than_samples_lose_none() -> None:
    order = SampleOrder(np.array([5, 1, 7]), window=2, seed=3, lanes=64)
    assert all(sorted(order(13 * epoch + place) for place in range(13)) == list(range(13)) for epoch in range(9))
