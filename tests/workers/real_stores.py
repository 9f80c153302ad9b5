"""Real stores rather than one that was written for the tests: nginx over a folder, and moto's S3."""

import os
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from launcher import unused_port

_NGINX = """
daemon off; master_process off; pid {root}/pid; error_log {root}/error.log; {user}
events {{}}
http {{
  log_format sent "$uri $body_bytes_sent"; access_log {root}/sent sent;
  client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
  uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
  server {{ listen 127.0.0.1:{port}; root {folder}; }}
}}
"""


class Served(NamedTuple):
    """A folder in a store.

    Attributes:
        url: of the folder.
        environment: in which its clients find the store.
        sent: bytes of shards that it has given so far.
    """

    url: str
    environment: dict[str, str]
    sent: Callable[[], int]


@contextmanager
def nginx(folder: Path, root: Path) -> Iterator[Served]:
    """Serve a folder; `root` is an empty one for nginx itself."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    port, user = unused_port(), "user root;" if os.geteuid() == 0 else ""
    (root / "conf").write_text(_NGINX.format(root=root, folder=folder, port=port, user=user))
    server = subprocess.Popen(["nginx", "-p", str(root), "-c", str(root / "conf")], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/shards.json", timeout=60):
            break
        time.sleep(0.02)

    def sent() -> int:
        lines = [line.split() for line in (root / "sent").read_text().splitlines()]
        return sum(int(size) for name, size in lines if name.endswith(".tar"))

    try:
        yield Served(url, {}, sent)
    finally:
        server.terminate()
        server.wait()


@contextmanager
def moto(folder: Path) -> Iterator[Served]:
    """A bucket with the files of a folder; several of these at once are doors to one bucket."""
    pytest.importorskip("moto.server")
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app, sizes = DomainDispatcherApplication(create_backend_app), []

    def counted(environ: dict[str, Any], start_response: Callable) -> Any:
        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".tar"):
                sizes.append(int(dict(headers)["Content-Length"]))
            return start_response(status, headers, *rest)

        return app(environ, start)

    server = make_server("127.0.0.1", 0, counted, threaded=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3",
        region_name="us-east-1",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    client.create_bucket(Bucket="bucket")
    for path in folder.glob("*"):
        if path.is_file():
            client.upload_file(str(path), "bucket", f"set/{path.name}")
    try:
        yield Served("s3://bucket/set", environment, lambda: sum(sizes))
    finally:
        server.shutdown()
        server.server_close()
