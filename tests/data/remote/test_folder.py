from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config.data import DataConfig, SourceConfig
from pipeline.data.check import stats
from pipeline.data.homes import known_classes
from pipeline.data.keys import keys_of
from pipeline.data.loader import Loader
from pipeline.data.patterns import list_shards
from pipeline.data.reader import Dataset
from pipeline.data.remote.folder import _cache_home, open_remote
from pipeline.data.remote.patience import WEATHER, SourceError
from pipeline.data.shards import index
from pipeline.data.stream import SampleStream
from pipeline.errors import UserError

RANKS = (2, 1, 3, 5)
BRIEF = ("e503", "reset", "cut", "short", "whole")  # and do not last for a second, as a stall does


@pytest.fixture
def folder(make_shard: Callable[..., Path], pictures: list[bytes]) -> Path:
    """Three shards of 10, 6 and 14 images, labelled, one key of two hundred characters, with class names."""
    numbers = iter(range(30))
    for shard, size in enumerate((10, 6, 14)):
        files = {}
        for number in [next(numbers) for _ in range(size)]:
            key = f"k{number:02d}" if number != 4 else f"deep/{'long' * 50}"
            files |= {f"{key}.jpg": pictures[number], f"{key}.cls": b"%d" % (number % 3)}
        path = make_shard(files, f"train-{shard:06d}.tar")
    (path.parent / "classes.txt").write_text("cat\ndog\nowl\n")
    index([str(path.parent / f"train-{shard:06d}.tar") for shard in range(3)])
    return path.parent


def pattern(where: object) -> str:
    return f"{where}/train-{{000000..000002}}.tar"


def test_store_gives_what_the_disk_gives(folder: Path, serve: Callable) -> None:
    server = serve(folder)
    server.rate, server.faults = 0.15, BRIEF
    here, there = Dataset(pattern(folder)), Dataset(pattern(server.url))
    assert there.is_remote
    assert there.described() == here.described()
    for record in range(30):
        assert there.image(record) == here.image(record)
        assert there.label(record) == here.label(record)
        assert there.key(record) == here.key(record)
        assert str(there.shard(record)) == f"{server.url}/{here.shard(record).name}"
    assert known_classes(there.shard(0)) == ["cat", "dog", "owl"]
    assert keys_of(there) == keys_of(here) == [here.key(record) for record in range(30)]
    found = [stats(pattern(where), progress=False) for where in (folder, server.url)]
    assert len({(str(one.formats), str(one.classes), str(one.kilobytes)) for one in found}) == 1


def test_keys_at_once_are_of_the_samples_that_have_the_wanted_image(
    make_shard: Callable[..., Path], pictures: list[bytes]
) -> None:
    files = {"a.input.jpg": pictures[0], "b.target.jpg": pictures[1], "c.target.jpg": pictures[2]}
    index(str(make_shard(files)), "target")
    dataset = Dataset(str(make_shard(files)))
    assert keys_of(dataset) == [dataset.key(record) for record in range(2)] == ["b", "c"]


def test_names_are_held_against_the_catalog(folder: Path, serve: Callable) -> None:
    url = serve(folder).url
    expected = [f"{url}/train-{shard:06d}.tar" for shard in range(3)]
    assert list_shards(f"{url}/*.tar") == list_shards(f"{url}/train-00000[0-2].tar") == expected
    assert list_shards([SourceConfig(name="a", url=f"{folder}/t*.tar")]) == [
        f"{folder}/{Path(n).name}" for n in expected
    ]
    with pytest.raises(UserError, match=r"missing shard \(.*train-000003\.tar\)"):
        list_shards(f"{url}/train-{{000000..000003}}.tar")
    with pytest.raises(UserError, match="no shard of that name is in the catalog"):
        list_shards(f"{url}/val-*.tar")
    (folder / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"missing shard \(.*train-000001\.tar\)"):
        list_shards([SourceConfig(name="a", url=f"{folder}/*.tar")])


def test_shards_without_a_catalog_in_the_store_are_refused(folder: Path, serve: Callable) -> None:
    (folder / "rows.npy").unlink()
    with pytest.raises(UserError, match=r"no catalog there \(.*rows\.npy\): poa shards index"):
        Dataset(pattern(serve(folder).url))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://h/a.tar", "no kind of address"),
        ("https://me:word@h/a.tar", r"with credentials \(https://h/a\.tar\)"),
        ("https://h/a.tar?sig=word", r"with credentials \(https://h/a\.tar\?\.\.\.\)"),
        ("pipe:cat a.tar", "no address that can be read"),
    ],
)
def test_other_addresses_and_secrets_in_them_are_refused_unseen(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        list_shards(address)
    assert "word" not in str(raised.value)


def test_rows_are_fetched_once_per_node_and_version(folder: Path, serve: Callable) -> None:
    server = serve(folder)
    for _ in range(3):  # as three processes
        open_remote.cache_clear()
        Dataset(pattern(server.url))
    assert server.sent["rows.npy"] == (folder / "rows.npy").stat().st_size
    server.versions["rows.npy"] += 1
    open_remote.cache_clear()
    Dataset(pattern(server.url))
    assert server.sent["rows.npy"] == 2 * (folder / "rows.npy").stat().st_size


def test_object_of_other_bytes_than_the_catalog_says_is_refused(folder: Path, serve: Callable) -> None:
    server = serve(folder)
    with open(folder / "train-000001.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"shards\.json says .*train-000001\.tar"):
        Dataset(pattern(server.url)).image(10)


def test_no_sample_is_left_out_because_of_the_store(folder: Path, serve: Callable) -> None:
    server = serve(folder)
    dataset = Dataset(pattern(server.url))
    stream = SampleStream(dataset, window=2, seed=0, max_pixels=10**9)
    [stream.pick(position) for position in range(30)]
    for name, fault in (("train-000000.tar", "e404"), ("train-000001.tar", "e403"), ("train-000002.tar", "changed")):
        server.always = {name: fault}
        with pytest.raises(SourceError, match=name):
            [stream.pick(position) for position in range(30)]
    server.always = {}
    server.versions.clear()
    assert not any(stream.pick(position).rejected for position in range(30))


def test_ledger_is_exact_over_three_epochs_and_any_history_of_ranks(folder: Path, serve: Callable) -> None:
    """Two sources over a store with faults; killed and resumed, from the number of samples alone, on other ranks."""
    server = serve(folder)
    server.rate, server.faults = 0.15, BRIEF
    urls = {"a": f"{server.url}/train-00000[02].tar", "b": f"{server.url}/train-000001.tar"}
    train = [
        SourceConfig(name=name, url=url, weight=weight)
        for (name, url), weight in zip(urls.items(), (4, 1), strict=True)
    ]
    batch, sample, used = 30, 0, []
    for world_size in RANKS:
        dataset = Dataset(train)  # as new processes would
        streams = [SampleStream(dataset, window=2, seed=1, max_pixels=10**9) for _ in range(world_size)]
        for _ in range(1):
            for rank, stream in enumerate(streams):
                share = batch // world_size
                used += [stream.pick(sample + rank * share + i).record for i in range(share)]
            sample += batch
    a_bytes, b_bytes = (sum(len(dataset.image(r)) for r in used if (r < 24) == first) for first in (True, False))
    assert WEATHER.fetched == {"a": 2 * a_bytes, "b": 2 * b_bytes}, "once for the ranks and once for this sum"
    assert WEATHER.retries.total() >= server.met.total() > 0
    whole = SampleStream(Dataset(train), window=2, seed=1, max_pixels=10**9)
    assert used == [whole.order(position) for position in range(sample)]
    a, b = [r for r in used if r < 24], [r for r in used if r >= 24]
    assert [sorted(a[i : i + 24]) for i in range(0, 72, 24)] == [list(range(24))] * 3
    assert [sorted(b[i : i + 6]) for i in range(0, 18, 6)] == [list(range(24, 30))] * 3


def test_loader_gives_the_same_crops_from_a_store_through_a_cache(
    folder: Path, serve: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks of a node that share a folder, over two epochs, beside two that read from a disk."""
    server = serve(folder)
    server.rate, server.faults = 0.15, BRIEF
    monkeypatch.setattr(WEATHER, "hits", 0)
    monkeypatch.setattr(WEATHER, "misses", 0)
    crops = {"global_crops": {"size": 32}, "local_crops": {"count": 2, "size": 16}, "threads": 1, "batch_size": 5}
    tree = {**crops, "lanes": 2, "window": 1, "cache": {"folder": str(tmp_path / "node")}}

    def ranks(where: object) -> list[Loader]:
        data = DataConfig.model_validate({**tree, "train": pattern(where)})
        return [Loader(data, rank=rank, world_size=2) for rank in range(2)]

    here, there = ranks(folder), ranks(server.url)
    for _ in range(6):
        for one, other in zip(here, there, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(next(one), next(other), strict=True))
    assert not any(loader.skipped for loader in there)
    for loader in here + there:
        loader.close()
    assert WEATHER.hits + WEATHER.misses >= 60, "those of the disk are not looked for"
    assert sorted(p.name for p in (tmp_path / "node").iterdir() if p.suffix == ".part") == []


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(UserError, match=r"this user has no home.*XDG_CACHE_HOME"):
        _cache_home()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _cache_home() == tmp_path
