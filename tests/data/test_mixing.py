from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.data import SourceConfig
from pipeline.data.mixing import ROWS, Mix, Segment, integer_shares
from pipeline.data.reader import Dataset
from pipeline.data.stream import SampleStream
from pipeline.errors import UserError

SHARES = [500, 333, 167]


def test_shares_are_integers_in_proportion_by_largest_remainders() -> None:
    names = ["a", "b", "c"]
    assert integer_shares([3, 2, 1], names) == [500, 333, 167]
    assert integer_shares([1, 1, 1], names) == [334, 333, 333]
    assert integer_shares([1e6, 5e5, 2000], names) == [666, 333, 1]
    with pytest.raises(UserError, match="weight of source c is less than a thousandth"):
        integer_shares([1e6, 1e6, 100], names)


def test_every_block_holds_every_share_exactly_and_every_stream_is_whole() -> None:
    mix = Mix(SHARES, seed=4)
    drawn = [mix(position) for position in range(3 * ROWS)]
    for block in range(3):
        assert Counter(source for source, _ in drawn[block * ROWS : (block + 1) * ROWS]) == dict(enumerate(SHARES))
    for source, share in enumerate(SHARES):
        assert [place for number, place in drawn if number == source] == list(range(3 * share))
    assert [mix(position) for position in reversed(range(3 * ROWS))] == drawn[::-1], "a pure function of the position"
    assert [Mix(SHARES, seed=5)(position) for position in range(100)] != drawn[:100]


@pytest.mark.parametrize("end", [0, 1, 999, 1000, 2345])
def test_used_counts_what_was_taken_and_the_next_segment_goes_on_from_there(end: int) -> None:
    first = Mix(SHARES, seed=4)
    used = first.used(end)
    assert used == np.bincount([first(p)[0] for p in range(end)], minlength=3).tolist()
    second = Mix([100, 400, 500], seed=4, segment=Segment(1, end, tuple(used)))
    drawn = [second(position) for position in range(end, end + 2 * ROWS)]
    for source, count in enumerate([200, 800, 1000]):
        assert [place for number, place in drawn if number == source] == list(range(used[source], used[source] + count))
    assert second.used(end + 2 * ROWS) == [used[0] + 200, used[1] + 800, used[2] + 1000]


def sources(make_shard: Callable[..., Path], pictures: list[bytes]) -> list[SourceConfig]:
    """`a` has seven images, one of them bad, and `b` five; three of four images are to come from `a`."""
    sets = {"a": [b"", *pictures[1:7]], "b": pictures[7:12]}
    for name, images in sets.items():
        make_shard({f"{name}{i}.jpg": data for i, data in enumerate(images)}, f"{name}.tar")
    folder = make_shard({}, "unused.tar").parent
    return [SourceConfig(name=name, url=str(folder / f"{name}.tar"), weight=w) for name, w in (("a", 3), ("b", 1))]


def test_each_source_is_an_endless_stream_of_its_own_epochs(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    dataset = Dataset(sources(make_shard, pictures))
    stream = SampleStream(dataset, window=2, seed=0, max_pixels=10**9)
    records = [stream.order(position) for position in range(ROWS)]
    for first, size, share in ((0, 7, 750), (7, 5, 250)):
        own = [record - first for record in records if first <= record < first + size]
        assert len(own) == share
        epochs = [sorted(own[i : i + size]) for i in range(0, share - size, size)]
        assert all(epoch == list(range(size)) for epoch in epochs)


def test_substitute_comes_from_the_source_of_what_it_replaces(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    stream = SampleStream(Dataset(sources(make_shard, pictures)), window=2, seed=0, max_pixels=10**9)
    picked = [stream.pick(position) for position in range(200)]
    replaced = [p for p in picked if p.rejected]
    assert replaced
    assert all(1 <= p.record < 7 for p in replaced)
    assert sum(p.record < 7 for p in picked) == sum(stream.order(position) < 7 for position in range(200))


def test_order_of_a_source_does_not_depend_on_its_neighbours(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    a, b = sources(make_shard, pictures)
    both = Dataset([a, b])
    reversed_ = Dataset([b, a])

    def keys(dataset: Dataset, name: str) -> list[str]:
        stream = SampleStream(dataset, window=2, seed=0, max_pixels=10**9)
        drawn = [dataset.key(stream.order(position)) for position in range(60)]
        return [key for key in drawn if key.startswith(name)][:10]

    assert keys(both, "b") == keys(reversed_, "b")
    assert keys(both, "a") == keys(reversed_, "a")


def test_a_set_without_a_name_has_the_order_it_always_had(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    paths = [str(make_shard({f"{s}{i}.jpg": pictures[5 * s + i] for i in range(s + 3)}, f"{s}.tar")) for s in range(4)]
    stream = SampleStream(Dataset(paths), window=2, seed=7, max_pixels=10**9)
    # what the first version of this stream gave, from numpy's Philox alone
    starts = [0, 3, 7, 12, 18]
    expected = []
    for epoch in range(3):
        generator = np.random.Generator(np.random.Philox(key=[7, 1], counter=[0, 0, 0, epoch]))
        shards = generator.permutation(4)
        for window in range(2):
            records = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[2 * window : 2 * window + 2]])
            generator = np.random.Generator(np.random.Philox(key=[7, 2], counter=[0, 0, window, epoch]))
            expected += generator.permutation(records).tolist()
    assert [stream.order(position) for position in range(54)] == expected


def test_lanes_have_blocks_of_their_own_and_stay_lanes() -> None:
    """Exact in every block of every lane, each stream whole, and a source's position in the lane of the run's."""
    mix = Mix(SHARES, seed=4, lanes=3)
    drawn = [mix(position) for position in range(6 * ROWS)]
    assert all(place % 3 == position % 3 for position, (_, place) in enumerate(drawn))
    for lane in range(3):
        for block in range(2):
            rows = drawn[3 * block * ROWS + lane : 3 * (block + 1) * ROWS : 3]
            assert Counter(source for source, _ in rows) == dict(enumerate(SHARES))
    for source, share in enumerate(SHARES):
        assert sorted(place for number, place in drawn if number == source) == list(range(6 * share))
    assert [source for source, _ in drawn[0::3]] != [source for source, _ in drawn[1::3]]


@pytest.mark.parametrize("end", [0, 1, 3500])
def test_next_segment_goes_on_in_every_lane(end: int) -> None:
    first = Mix(SHARES, seed=4, lanes=3)
    before = [first(position) for position in range(end)]
    second = Mix([100, 400, 500], seed=4, segment=Segment(1, end, tuple(first.used(end))), lanes=3)
    after = [second(position) for position in range(end, end + 3 * ROWS)]
    for source in range(3):
        places = sorted(place for number, place in before + after if number == source)
        lanes = [[place for place in places if place % 3 == lane] for lane in range(3)]
        assert all(np.diff(lane).tolist() == [3] * (len(lane) - 1) and lane[0] < 3 for lane in lanes), (
            "no gap, no twice"
        )
    following = [second.next(end + 100, lane) for lane in range(3)]
    assert [following[second.lane(p)][second(p)[0]] for p in range(end + 100, end + 103)] == [
        second(p)[1] for p in range(end + 100, end + 103)
    ]


def test_segment_that_begins_at_a_whole_epoch_has_all_of_it_in_any_lanes() -> None:
    mix = Mix([1000], seed=4, segment=Segment(2, 77, (40,)), lanes=7)
    assert sorted(mix(position)[1] for position in range(77, 77 + 70)) == list(range(40, 110))
