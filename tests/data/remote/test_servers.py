"""Real stores rather than one that was written for the tests: nginx over a folder, and moto's S3."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_stores import moto, nginx

from pipeline.config import DataConfig
from pipeline.data.reader import Dataset
from pipeline.data.reading import Reading
from pipeline.data.remote import cache as caches
from pipeline.data.remote.folder import open_remote
from pipeline.data.remote.patience import WEATHER, SourceError
from pipeline.data.shards import index


@pytest.fixture
def folder(make_shard: Callable[..., Path], pictures: list[bytes]) -> Path:
    for shard in range(4):
        path = make_shard({f"{shard}{i}.jpg": pictures[6 * shard + i] for i in range(6)}, f"train-{shard:06d}.tar")
    index([str(path.parent / f"train-{shard:06d}.tar") for shard in range(4)])
    return path.parent


@pytest.fixture(params=["nginx", "moto"])
def url(
    request: pytest.FixtureRequest,
    folder: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    store = nginx(folder, tmp_path_factory.mktemp("nginx")) if request.param == "nginx" else moto(folder)
    with store as served:
        for name, value in served.environment.items():
            monkeypatch.setenv(name, value)
        yield served.url


def replace(url: str, path: Path) -> None:
    """Put other bytes of the same number where a shard was."""
    path.write_bytes(path.read_bytes()[:-10] + b"something.")
    if url.startswith("s3"):
        import boto3

        client = boto3.client("s3", region_name="us-east-1", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        client.upload_file(str(path), "bucket", f"set/{path.name}")
    else:
        os.utime(path, (1, 1))


def test_stores_give_what_the_disk_gives_and_a_changed_object_is_noticed(
    url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Dataset(f"{folder}/train-{{000000..000003}}.tar")
    tree = {"train": f"{url}/train-*.tar", "cache": {"folder": str(tmp_path / "node")}, "window": 4, "batch_size": 24}
    monkeypatch.setattr(caches, "_THREADS", 0)  # the cache brings what it is told to bring
    for _ in range(2):
        monkeypatch.setattr(WEATHER, "hits", 0)
        open_remote.cache_clear()  # as another start
        reading = Reading(DataConfig.model_validate(tree))
        assert reading.dataset.described() == here.described()
        reading.want(0)
        while reading.cache.bring():
            pass
        picked = reading.pick(range(24))
        assert sorted(p.record for p in picked) == list(range(24))
        assert all(reading.dataset.image(r) == here.image(r) for r in range(24))
        reading.close()
    assert WEATHER.hits == 48
    assert WEATHER.fetched[""] <= sum(path.stat().st_size for path in folder.glob("*.tar")), "once for both starts"
    replace(url, folder / "train-000002.tar")
    with pytest.raises(SourceError, match=r"the object has changed \(.*train-000002\.tar\)"):
        reading.dataset.image(13)
    assert reading.dataset.image(0) == here.image(0)
