"""The dashboard of a run as one page, over a Prometheus server; needs no Grafana and no other host."""

import json
import re
import socket
import sys
import urllib.error
import urllib.parse
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources

from pipeline.errors import UserError
from pipeline.monitor.panels import SECTIONS
from pipeline.monitor.prometheus import NoAnswerError, Prometheus

# what the page asks for; reading only
_PASSED_ON = re.compile(r"/api/v1/(query|query_range|alerts|label/\w+/values)")


def page(run_name: str) -> str:
    """The page for a run, with the panels in it.

    Args:
        run_name: the label of the run, see `pipeline.monitor.discovery.run_label`.
    """
    sections = json.dumps([asdict(section) for section in SECTIONS]).replace("<", "\\u003c")
    template = resources.files("pipeline.monitor").joinpath("watch.html").read_text(encoding="utf-8")
    return template.replace("__RUN__", run_name).replace("__SECTIONS__", sections)


def make_server(run_name: str, url: str, host: str, port: int) -> ThreadingHTTPServer:
    """A server of the page that passes queries on to Prometheus.

    Args:
        run_name: the label of the run.
        url: of Prometheus.
        host: address to serve on.
        port: to serve on, 0 for a free one.

    Raises:
        UserError: Prometheus does not answer, or the address cannot be used.
    """
    prometheus = Prometheus(url)
    prometheus.require()
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
                self._answer(200, "application/json", prometheus.ask(self.path))
            except urllib.error.HTTPError as error:
                self._answer(error.code, "application/json", error.read())
            except NoAnswerError as error:
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

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, request: object, client_address: object) -> None:
            """A browser that left is no news."""
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)  # type: ignore[arg-type]

    try:
        return Server((host, port), Handler)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "that is no host name"
        fix = "choose another --host or --port; port 0 is a free one"
        raise UserError(f"cannot serve the page: {reason}", f"{host}:{port}", fix) from error
