"""A store on this machine that misbehaves: an HTTP server over a folder, which answers some requests in wrong ways."""

import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.remote import patience
from pipeline.data.remote import store as stores
from pipeline.data.remote.folder import open_remote

FAULTS = ("e503", "e429", "reset", "cut", "short", "whole", "stall")


class Faulty(ThreadingHTTPServer):
    """Serves `folder`; a share `rate` of the GETs meets one of `faults`. `always` has faults by name of object.

    What is `sent`, in bytes by name of object, leaves out those for which nobody asked.

    A store that is `far_away` takes 40 ms for an answer: the system then sends a body once the client has acknowledged
    the header.
    """

    daemon_threads = True
    far_away = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.rate, self.faults = folder, 0.0, FAULTS
        self.random = random.Random(0)
        self.always: dict[str, str] = {}
        self.versions: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what this is for."""

    def fault(self, name: str, method: str) -> str | None:
        with self.lock:
            fault = self.always.get(name)
            if fault is None and method == "GET" and self.random.random() < self.rate:
                fault = self.random.choice(self.faults)
            if fault:
                self.met[fault] += 1
        return fault


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def setup(self) -> None:
        self.disable_nagle_algorithm = not self.server.far_away
        super().setup()

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def answer(self, method: str) -> None:
        name = self.path.lstrip("/")
        fault = self.server.fault(name, method)
        if fault in ("e503", "e429", "e403", "e404") or not (self.server.folder / name).is_file():
            return self.refuse(int(fault[1:]) if fault else 404)
        if fault == "changed":
            self.server.versions[name] += 1
        tag = f'"{name}-{self.server.versions[name]}"'
        if self.headers.get("If-Match", tag) != tag:
            return self.refuse(412)
        data = (self.server.folder / name).read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = data[int(found[1]) : int(found[2]) + 1] if found else data
        if fault != "whole":
            data = part
        announced = len(data) // 2 if fault == "short" else len(data)
        self.send_response(206 if found and fault != "whole" else 200)
        self.send_header("ETag", tag)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 10:00:00 GMT")
        self.send_header("Content-Length", str(announced))
        if found and fault != "whole":
            self.send_header(
                "Content-Range", f"bytes {found[1]}-{found[2]}/{(self.server.folder / name).stat().st_size}"
            )
        self.end_headers()
        if method == "HEAD":
            return None
        if fault in ("reset", "cut", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(3)
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return None
        with self.server.lock:  # before the client can know
            self.server.sent[name] += min(announced, len(part))
        self.wfile.write(data[:announced])
        return None

    def refuse(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Waits of a test's length, and a place of its own for catalogs."""
    monkeypatch.setattr(patience, "_FIRST_WAIT", 0.005)
    monkeypatch.setattr(stores, "_CLIENT", {**stores._CLIENT, "read_timeout": stores.timedelta(seconds=1)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(patience.WEATHER, "patience", None)
    open_remote.cache_clear()
    patience.WEATHER.retries.clear()
    patience.WEATHER.fetched.clear()


@pytest.fixture
def serve(quick: None) -> Iterator[Callable[[Path], Faulty]]:
    """Serve a folder until the test ends."""
    servers = []

    def start(folder: Path) -> Faulty:
        server = Faulty(folder)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
