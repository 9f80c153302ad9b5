"""Real stores rather than one that was written for the tests: nginx over a folder, and moto's S3."""

import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.config import DataConfig
from pipeline.data.reader import Dataset
from pipeline.data.reading import Reading
from pipeline.data.remote import cache as caches
from pipeline.data.remote.folder import open_remote
from pipeline.data.remote.patience import WEATHER, SourceError
from pipeline.data.shards import index

_NGINX = """
daemon off; master_process off; pid {root}/pid; error_log {root}/error.log; {user}
events {{}}
http {{
  access_log off;
  client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
  uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
  server {{ listen 127.0.0.1:{port}; root {folder}; }}
}}
"""


@pytest.fixture
def folder(make_shard: Callable[..., Path], pictures: list[bytes]) -> Path:
    for shard in range(4):
        path = make_shard({f"{shard}{i}.jpg": pictures[6 * shard + i] for i in range(6)}, f"train-{shard:06d}.tar")
    index([str(path.parent / f"train-{shard:06d}.tar") for shard in range(4)])
    return path.parent


@pytest.fixture(params=["nginx", "moto"])
def url(request: pytest.FixtureRequest, folder: Path, quick: None) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture
def nginx(folder: Path, free_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    root = tmp_path_factory.mktemp("nginx")
    user = "user root;" if os.geteuid() == 0 else ""
    (root / "conf").write_text(_NGINX.format(root=root, folder=folder, port=free_port, user=user))
    server = subprocess.Popen(["nginx", "-p", str(root), "-c", str(root / "conf")], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{free_port}"
    while server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/shards.json", timeout=60):
            break
        time.sleep(0.02)
    yield url
    server.terminate()
    server.wait()


@pytest.fixture
def moto(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    servers = pytest.importorskip("moto.server")
    server = servers.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3

    client = boto3.client("s3", region_name="us-east-1", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="bucket")
    for path in folder.iterdir():
        client.upload_file(str(path), "bucket", f"set/{path.name}")
    yield "s3://bucket/set"
    server.stop()


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
