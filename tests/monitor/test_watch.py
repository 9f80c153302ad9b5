"""The page's server: addresses that cannot be meant, and servers that are no Prometheus."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.errors import UserError
from pipeline.monitor.watch import make_server, page

BUILD = b'{"status": "success", "data": {"version": "3.5.0"}}'


@contextmanager
def server(body: bytes, length: int | None = None) -> Iterator[str]:
    """Answers every request with a body, of which it may promise more than it sends."""
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(head + body)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "url",
    ["prom.cluster", "localhost:9090", "http://localhost:port", "http://localhost:99999", "http://", "", "ftp://a",
     "http://user:word@a", "http://[::1", "file:///etc/passwd"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_an_example(url):
    with pytest.raises(UserError, match=r"no address.*http://HOST:PORT"):
        make_server("a", url, "127.0.0.1", 0)


@pytest.mark.parametrize("body", [b"{}", b"<html>", b"[]", b"\xff", b'{"data": {"version": 3}}'])
def test_a_server_that_is_no_prometheus_is_refused(body):
    with server(body) as url, pytest.raises(UserError, match="no Prometheus"):
        make_server("a", url, "127.0.0.1", 0)


def test_an_answer_that_ends_early_or_none_at_all_is_one_line():
    with server(b"{}", 200) as url, pytest.raises(UserError, match="does not answer"):
        make_server("a", url, "127.0.0.1", 0)
    with pytest.raises(UserError, match=r"does not answer.*refused"):
        make_server("a", url, "127.0.0.1", 0)
    with pytest.raises(UserError, match="does not answer"):
        make_server("a", "http://a..b:1", "127.0.0.1", 0)


def test_a_proxy_is_not_asked_for_a_server_on_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with server(BUILD) as url:
        make_server("a", url, "127.0.0.1", 0).server_close()
        make_server("a", url.replace("127.0.0.1", "localhost"), "127.0.0.1", 0).server_close()


@pytest.mark.parametrize("host", ["a..b", "no-such-host.invalid", "203.0.113.1"])
def test_an_address_that_cannot_be_served_on_is_refused(host):
    with server(BUILD) as url, pytest.raises(UserError, match=r"cannot serve the page.*--host"):
        make_server("a", url, host, 0)


def test_the_page_asks_for_the_run_by_its_label():
    assert '"sweep/1-0a1b2c"' in page("sweep/1-0a1b2c")
