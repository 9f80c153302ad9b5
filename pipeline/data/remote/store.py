"""Ranges of objects in a store: exactly the bytes asked for, of one version of the object, or an error by name.

No client is trusted: with obstore, as with all others, an answer may be short and consistent in itself. So every read
is of a fixed range, of at most `PART` bytes, under the version that was seen first, and its length is compared.
"""

import functools
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from pipeline.config.address import without_secrets
from pipeline.data.remote.patience import Passing, SourceError, patiently
from pipeline.errors import UserError

PART = 32 << 20  # bytes of a request: bounds what a stall costs, and what a retry repeats
_NO_RETRIES: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
# where the clients ask for credentials if the environment has none; machines within the cloud answer there
_CREDENTIAL_HOSTS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
_CLIENT = {
    "timeout": timedelta(seconds=300),
    "read_timeout": timedelta(seconds=20),
    "connect_timeout": timedelta(seconds=10),
}


class Store:
    """The objects below one address. Safe to use from many threads, and after a fork.

    Args:
        url: of a folder, without credentials: obstore takes them from the environment.
        patience: seconds to wait for what passes; see `patiently`.
    """

    def __init__(self, url: str, patience: float | None = None) -> None:
        self.url, self.patience = url, patience
        self._lock = threading.Lock()
        self._opened: tuple[int, Any] | None = None
        self._seen: dict[str, tuple[int, str | None]] = {}

    def size(self, name: str) -> int:
        """Bytes of an object; from then on only this version of it is read.

        Raises:
            SourceError: see `read`.
        """
        if name not in self._seen:
            self._seen[name] = self._try(lambda: self._head(name), name)
        return self._seen[name][0]

    def version(self, name: str) -> str | None:
        """What tells the version that is read from others; None if the store gives none."""
        self.size(name)
        return self._seen[name][1]

    def read(self, name: str, start: int, size: int, given_up: Callable[[], bool] = lambda: False) -> bytes:
        """Bytes of an object; `given_up` says whether nobody waits for them any longer.

        Raises:
            SourceError: it is gone, forbidden or not the one that was seen first, or patience is spent.
        """
        self.size(name)
        end = start + size
        ranges = [(begin, min(begin + PART, end)) for begin in range(start, end, PART)]
        return b"".join(self._try(functools.partial(self._range, name, *part), name, given_up) for part in ranges)

    def _try(self, attempt: Any, name: str, given_up: Callable[[], bool] = lambda: False) -> Any:
        def checked() -> Any:
            from obstore import exceptions

            try:
                return attempt()
            except Exception as error:
                raise _judge(error, exceptions, where, bool(self._seen)) from error

        where = f"{self.url}/{name}"
        return patiently(checked, where, self.patience, given_up)

    def _head(self, name: str) -> tuple[int, str | None]:
        found = self._store().head(name)
        return found["size"], found["e_tag"]

    def _range(self, name: str, start: int, end: int) -> bytes:
        version = self._seen[name][1]
        options = {"range": (start, end), **({"if_match": version} if version else {})}
        data = self._store().get(name, options=options).bytes()
        if len(data) != end - start:
            raise Passing("short", f"{len(data)} bytes instead of {end - start}")
        return bytes(data)

    def _store(self) -> Any:
        """Of this process: obstore hangs for ever in a process that was forked from the one that opened it."""
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = (os.getpid(), _open(self.url))
            return self._opened[1]


def _open(url: str) -> Any:
    from obstore.store import from_url

    endpoint = os.environ.get("AWS_ENDPOINT_URL", "") if url.startswith("s3:") else url
    options: Any = {**_CLIENT, "allow_http": endpoint.startswith("http://")}
    try:
        return from_url(url, client_options=options, retry_config=_NO_RETRIES)
    except Exception as error:  # of its own hierarchy, and ValueError
        raise UserError(f"cannot open the store: {_brief(error)}", url, "correct the address") from error


def _judge(error: Exception, exceptions: Any, where: str, was_reached: bool) -> Exception:
    """What follows from an error; `was_reached` says whether this process has read from the store before."""
    if isinstance(error, (UserError, Passing)):
        return error
    if not was_reached and any(host in str(error) for host in _CREDENTIAL_HOSTS):
        fix = "set them there (for a public bucket AWS_SKIP_SIGNATURE=true), or name shards on a local disk"
        return SourceError("the environment holds no credentials for the store", where, fix)
    if isinstance(error, FileNotFoundError):
        return SourceError("there is no such object", where, "bring it back, or name another")
    if isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError)):
        return SourceError("access is denied", where, "see to the credentials in the environment and to the rights")
    if isinstance(error, exceptions.PreconditionError):
        return SourceError("the object has changed", where, "restore it, or index the shards and start a new run")
    if isinstance(error, (exceptions.BaseError, OSError)):
        return Passing(_reason(str(error)), _brief(error))
    return error


def _reason(text: str) -> str:
    for mark, reason in (("Timeout", "timeout"), ("status code: 5", "server"), ("status code: 429", "throttled")):
        if mark in text:
            return reason
    return "range" if "Range" in text else "connection"


def _brief(error: Exception) -> str:
    """One line, without the answer's body and without what may be a secret."""
    return without_secrets(str(error).split("\n")[0].split(": <?xml")[0])[:200]
