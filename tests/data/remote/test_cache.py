import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DataConfig
from pipeline.data.reader import Dataset
from pipeline.data.reading import Reading
from pipeline.data.remote import cache as caches
from pipeline.data.remote.cache import Cache
from pipeline.data.remote.folder import open_remote
from pipeline.data.remote.patience import WEATHER
from pipeline.data.shards import index
from pipeline.errors import UserError

SIZE = 5_000
COUNT = 6


@pytest.fixture
def server(make_shard: Callable[..., Path], serve: Callable, monkeypatch: pytest.MonkeyPatch):
    """Six shards of two images, each of `SIZE` bytes; caches fetch when they are told to, and not by threads."""
    monkeypatch.setattr(caches, "_THREADS", 0)
    monkeypatch.setattr(WEATHER, "hits", 0)
    monkeypatch.setattr(WEATHER, "misses", 0)
    for shard in range(COUNT):
        files = {f"{shard}{i}.jpg": bytes([16 * shard + i]) * SIZE for i in range(2)}
        folder = make_shard(files, f"train-{shard:06d}.tar").parent
    index([str(folder / f"train-{shard:06d}.tar") for shard in range(COUNT)])
    return serve(folder)


@pytest.fixture
def open_cache(server, tmp_path: Path) -> Iterator[Callable[..., Cache]]:
    """A cache of the node's folder, as one more rank has it; with room for so many pieces."""
    opened = []

    def rank(pieces: float = 100) -> Cache:
        dataset = Dataset(f"{server.url}/train-{{000000..000005}}.tar")
        cache = dataset.cache = Cache(tmp_path / "node", int(pieces * piece_bytes(dataset)), dataset.piece)
        cache.dataset = dataset
        opened.append(cache)
        return cache

    yield rank
    for cache in opened:
        if not cache._stop:
            cache.close()


def piece_bytes(dataset: Dataset) -> int:
    return dataset.piece(0).size


def bring(cache: Cache, *numbers: int, portion: float = 1.0) -> None:
    cache.want([(number, portion) for number in numbers])
    while cache.bring():
        pass


def kept(cache: Cache) -> int:
    """How many pieces are in the folder."""
    names = [name for name in os.listdir(cache.folder) if not name.startswith(("wish.", "lock"))]
    assert not any(name.endswith(".part") for name in names)
    assert sum((cache.folder / name).stat().st_size for name in names) <= cache.limit
    return len(names)


def here(cache: Cache, *numbers: int) -> list[bool]:
    """Whether reads of pieces come from the disk; they are right wherever they come from."""
    found = []
    for number in numbers:
        before = WEATHER.hits
        assert cache.dataset.image(2 * number) == bytes([16 * number]) * SIZE
        assert cache.dataset.image(2 * number + 1) == bytes([16 * number + 1]) * SIZE
        found.append(WEATHER.hits == before + 2)
    return found


def test_what_is_wanted_comes_once_for_all_ranks_of_a_node(server, open_cache: Callable[..., Cache]) -> None:
    one, other = open_cache(), open_cache()
    assert here(one, 0) == [False]
    WEATHER.fetched.clear()
    bring(one, 0, 1)
    bring(other, 0, 1)
    assert here(one, 0, 1) == here(other, 0, 1) == [True, True]
    assert WEATHER.fetched == {"": 2 * piece_bytes(one.dataset)}
    assert (WEATHER.hits, WEATHER.misses) == (8, 2)
    bring(other, 2)
    assert here(other, 1) == [False], "no longer asked for, so not looked for either"
    bring(one, 3)
    later = open_cache()  # another start
    bring(later, 0, 3)
    assert here(later, 0, 3) == [True, True]
    assert sum(server.sent[f"train-00000{n}.tar"] for n in (0, 3)) == 2 * piece_bytes(one.dataset) + 2 * SIZE


def test_a_piece_that_another_rank_finishes_meanwhile_leaves_no_part(
    open_cache: Callable[..., Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = open_cache(), open_cache()
    other.want([(0, 1.0)])
    is_due = other._is_due

    def looks(number: int, wishes: dict[str, float]) -> bool:
        due = is_due(number, wishes)
        bring(one, 0)
        return due

    monkeypatch.setattr(other, "_is_due", looks)
    other.bring()
    assert kept(one) == 1


def test_limit_holds_and_what_living_ranks_want_stays(open_cache: Callable[..., Cache]) -> None:
    one, other = open_cache(3), open_cache(3)
    bring(one, 0, 1)
    bring(other, 2)
    bring(one, 3)
    assert kept(one) == 3
    assert here(other, 2) == [True]
    bring(one, 4)
    bring(one, 5)
    assert kept(one) == 3
    assert here(other, 2) == here(one, 5) == [True]


def test_eviction_keeps_a_part_of_the_set_for_good(open_cache: Callable[..., Cache]) -> None:
    """Six pieces in another order in every epoch, three fit: the oldest first would find a fifth of them here."""
    cache, orders, found = open_cache(3), np.random.default_rng(0), []
    for _ in range(8):
        for number in orders.permutation(COUNT).tolist():
            cache.want([(number, 1.0)])
            cache._plan(cache._wish)
            found += here(cache, number)
            bring(cache, number)
            here(cache, number)
    assert sum(found[COUNT:]) > 0.35 * len(found[COUNT:])


def test_too_small_a_limit_goes_on_by_ranges_and_is_said_once(
    open_cache: Callable[..., Cache], caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(1.5)
    with caplog.at_level(logging.WARNING):
        bring(cache, 0, 1, 2)
        bring(cache, 1, 2)
    assert here(cache, 1, 2) == [True, False]
    assert kept(cache) == 1
    assert (WEATHER.hits, WEATHER.misses) == (2, 2)
    assert [r.message for r in caplog.records if "takes no more" in r.message] == [
        f"{cache.folder} takes no more ({cache.limit / 2**30:.3g} GiB are too few for what the ranks read next): "
        "what is missing is read range by range"
    ]


def test_full_disk_goes_on_by_ranges(open_cache: Callable[..., Cache], monkeypatch, caplog) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = open_cache()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(caches.os, "posix_fallocate", full)
        bring(cache, 0)
        assert here(cache, 0) == [False]
    assert "takes no more (No space left on device)" in caplog.text
    assert kept(cache) == 0
    bring(cache, 0, 1)
    assert here(cache, 0, 1) == [True, True], "there is room again"


def test_piece_is_fetched_whole_only_if_the_node_reads_most_of_it(open_cache: Callable[..., Cache]) -> None:
    one, other = open_cache(), open_cache()
    bring(one, 0, portion=0.3)
    assert here(one, 0) == [False]
    bring(other, 0, portion=0.25)
    assert here(other, 0) == [True], "together they do"
    other.close()
    bring(one, 1, portion=0.49)
    assert here(one, 1) == [False]


def test_dead_ranks_leave_nothing_behind(open_cache: Callable[..., Cache]) -> None:
    cache = open_cache(2)
    bring(cache, 0, 1)
    names = [name for _, name in cache._pieces.values()]
    (cache.folder / "wish.dead").write_text("".join(f"{name} 1.0\n" for name in names))
    (cache.folder / f"{'0' * 32}.part").write_bytes(bytes(SIZE))
    bring(cache, 2, 3)
    assert here(cache, 2, 3) == [True, True]
    assert kept(cache) == 2
    assert not (cache.folder / "wish.dead").exists()


def test_other_version_of_an_object_is_not_taken_for_it(server, open_cache: Callable[..., Cache]) -> None:
    bring(open_cache(), 0)
    server.versions["train-000000.tar"] += 1
    open_remote.cache_clear()  # as another start
    cache = open_cache()
    cache.want([(0, 1.0)])
    cache._plan(cache._wish)
    assert here(cache, 0) == [False]
    bring(cache, 0)
    assert kept(cache) == 2


def test_damaged_file_is_dropped_and_read_again(open_cache: Callable[..., Cache]) -> None:
    cache = open_cache()
    bring(cache, 0)
    os.truncate(cache.folder / cache._pieces[0][1], 600)
    assert here(cache, 0) == [False]
    bring(cache, 0)
    assert here(cache, 0) == [True]


def test_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot keep data here: .*file.*\): name a folder on a local disk"):
        Cache(tmp_path / "file" / "x", 1, lambda number: None)


def test_only_a_set_in_a_store_opens_a_cache(server, tmp_path: Path) -> None:
    data = {"batch_size": 4, "cache": {"folder": str(tmp_path / "cache-of-none")}}
    local = Reading(DataConfig.model_validate({"train": str(server.folder / "train-000000.tar"), **data}))
    assert local.cache is None
    assert not (tmp_path / "cache-of-none").exists()
