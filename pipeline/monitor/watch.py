"""The dashboard of a run as one page, over a Prometheus server; needs no Grafana and no other host."""

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources

from pipeline.errors import UserError
from pipeline.monitor.panels import SECTIONS

# what the page asks for; reading only
_PASSED_ON = re.compile(r"/api/v1/(query|query_range|alerts|label/\w+/values)")
_TIMEOUT_SECONDS = 30


def page(run_name: str) -> str:
    """The page for a run, with the panels in it."""
    sections = json.dumps([asdict(section) for section in SECTIONS]).replace("<", "\\u003c")
    template = resources.files("pipeline.monitor").joinpath("watch.html").read_text(encoding="utf-8")
    plain = re.sub(r"[^\w.\- ]", "_", run_name)
    return template.replace("__RUN__", plain).replace("__SECTIONS__", sections)


def make_server(run_name: str, prometheus: str, host: str, port: int) -> ThreadingHTTPServer:
    """A server of the page that passes queries on to Prometheus.

    Raises:
        UserError: Prometheus does not answer, or the address cannot be used.
    """
    base = prometheus.rstrip("/")
    try:
        _ask(base, "/api/v1/status/buildinfo")
    except OSError as error:
        raise UserError(
            f"Prometheus does not answer: {error}",
            base,
            "start it (see yaml/monitoring/prometheus.yaml), or name another with --prometheus",
        ) from error
    html = page(run_name).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urllib.parse.urlsplit(self.path).path
            if path == "/":
                self._answer(200, "text/html; charset=utf-8", html)
            elif _PASSED_ON.fullmatch(path):
                self._pass_on()
            else:
                self._answer(404, "text/plain", b"not found\n")

        def _pass_on(self) -> None:
            try:
                self._answer(200, "application/json", _ask(base, self.path))
            except urllib.error.HTTPError as error:
                self._answer(error.code, "application/json", error.read())
            except OSError as error:
                text = json.dumps({"status": "error", "error": f"Prometheus does not answer: {error}"})
                self._answer(502, "application/json", text.encode())

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A page that asks every 15 seconds would fill the terminal."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UserError(
            f"cannot serve the page: {error.strerror}", f"{host}:{port}", "choose another --port, or 0 for a free one"
        ) from error


def _ask(base: str, path: str) -> bytes:
    with urllib.request.urlopen(base + path, timeout=_TIMEOUT_SECONDS) as answer:
        return answer.read()
