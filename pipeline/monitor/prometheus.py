"""Asking a Prometheus server: its address, and its answers or why there is none."""

import http.client
import ipaddress
import json
import urllib.error
import urllib.parse
import urllib.request

from pipeline.errors import UserError

TIMEOUT_SECONDS = 30


class NoAnswerError(Exception):
    """The server cannot be reached, or what answers does not speak HTTP well."""


class Prometheus:
    """A Prometheus server.

    Args:
        url: its address, as a browser takes it.

    Raises:
        UserError: that is no address.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            parts = urllib.parse.urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(f"no address of a server: {error}", url, "write it as http://HOST:PORT") from error
        if parts.scheme not in ("http", "https") or not host or parts.username is not None or parts.query:
            raise UserError("no address of a server", url, "write it as http://HOST:PORT")
        # a proxy cannot know what this machine calls its own
        handlers = [urllib.request.ProxyHandler({})] if _is_this_machine(host) else []
        self._opener = urllib.request.build_opener(*handlers)

    def ask(self, path: str) -> bytes:
        """The answer to a GET request.

        Raises:
            urllib.error.HTTPError: the server refuses.
            NoAnswerError: there is no answer.
        """
        try:
            with self._opener.open(self.url + path, timeout=TIMEOUT_SECONDS) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NoAnswerError(str(getattr(error, "reason", "") or error) or type(error).__name__) from error

    def require(self) -> None:
        """See that a Prometheus answers there.

        Raises:
            UserError: it does not.
        """
        fix = "start it (see yaml/monitoring/prometheus.yaml), or name another with --prometheus"
        try:
            answer = json.loads(self.ask("/api/v1/status/buildinfo"))
            version = answer["data"]["version"]
        except (NoAnswerError, urllib.error.HTTPError) as error:
            raise UserError(f"Prometheus does not answer: {error}", self.url, fix) from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError("what answers there is no Prometheus", self.url, fix) from error
        if not isinstance(version, str):
            raise UserError("what answers there is no Prometheus", self.url, fix)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
