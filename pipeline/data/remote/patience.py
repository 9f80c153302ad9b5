"""What passes is waited for; what does not ends the run by name. Neither is a reason to leave a sample out."""

import errno
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from pipeline.errors import UserError

PATIENCE = 60.0  # seconds, of a command that somebody waits for; a run has its own
_LOOKING = 5.0  # seconds, where nothing depends on what is read
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 20.0
_LOOK = 0.5  # seconds between two looks for a wish to stop
_NOTABLE = 5.0  # seconds from which on a read is worth a word
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ECONNRESET, errno.ENFILE)

T = TypeVar("T")


class SourceError(UserError):
    """Data cannot be had: an object is gone, forbidden or changed, or patience is spent.

    Attributes:
        passing: it may be there again later.
    """

    def __init__(self, what: str, where: str, fix: str, passing: bool = False) -> None:
        super().__init__(what, where, fix)
        self.passing = passing

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.what, self.where, self.fix, self.passing)


class Weather:
    """What reading met in this process: told by metrics, of no influence on what is read.

    Attributes:
        retries: further attempts by reason.
        waited: seconds that samples waited for reads from stores, over all threads.
        fetched: bytes from stores, by name of the source.
        hits, misses: samples that the node's cache had, or had not.
        patience: seconds until what may pass is given up.
        stop_requested: not empty once the run was asked to stop; whoever waits then gives up.
    """

    def __init__(self) -> None:
        self.retries: Counter[str] = Counter()
        self.waited = 0.0
        self.fetched: Counter[str] = Counter()
        self.hits = self.misses = 0
        self.patience: float | None = None
        self.stop_requested: Sequence[int] = ()
        self._lock = threading.Lock()
        self._underway: dict[object, tuple[float, str]] = {}

    def retried(self, reason: str) -> None:
        with self._lock:
            self.retries[reason] += 1

    def read(self, source: str, size: int, seconds: float) -> None:
        """A sample was read from a store."""
        with self._lock:
            self.fetched[source] += size
            self.waited += seconds

    def kept(self, source: str, size: int) -> None:
        """Bytes were read from a store ahead of their use."""
        with self._lock:
            self.fetched[source] += size

    def looked_up(self, found: bool) -> None:
        """A sample was looked for in the node's cache."""
        with self._lock:
            self.hits += found
            self.misses += not found

    @contextmanager
    def reading(self, where: str) -> Iterator[Callable[[str], None]]:
        """While something is read from `where`; gives what to tell of each fault."""
        mark, began = object(), time.monotonic()
        self._underway[mark] = began, where
        try:
            yield lambda fault: self._underway.update({mark: (began, f"{where}: {fault}")})
        finally:
            del self._underway[mark]

    @contextmanager
    def for_a_look(self) -> Iterator[None]:
        """Less patience meanwhile, with a store that may not be in reach."""
        before, self.patience = self.patience, _LOOKING
        try:
            yield
        finally:
            self.patience = before

    def longest(self) -> str:
        """What has been waited for the longest, for whoever may take it for a hang; empty for nothing much."""
        began, where = min(list(self._underway.values()), default=(time.monotonic(), ""))
        seconds = time.monotonic() - began
        return f"waiting for {seconds:.0f} s for {where}" if where and seconds > _NOTABLE else ""


WEATHER = Weather()


class Passing(Exception):  # noqa: N818  named for what it is
    """A fault that may pass. `reason` is one word, fit for a metric's label."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def patiently(
    attempt: Callable[[], T],
    where: str,
    patience: float | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> T:
    """What `attempt` gives, tried again after longer and longer waits while it raises `Passing`.

    Args:
        where: what is read, for messages.
        patience: seconds until it is given up; that of the run by default, or `PATIENCE`.
        given_up: whether nobody wants it any longer.

    Raises:
        SourceError: patience is spent, or the run was asked to stop.
    """
    patience = next(seconds for seconds in (patience, WEATHER.patience, PATIENCE) if seconds is not None)
    began, wait = time.monotonic(), _FIRST_WAIT
    give_up = began + patience
    with WEATHER.reading(where) as tell:
        while True:
            try:
                return attempt()
            except Passing as fault:
                tell(str(fault))
                pause = wait * random.uniform(0.5, 1.5)  # ranks that failed together must not come back together
                if time.monotonic() + pause > give_up or not _wait(pause, given_up):
                    what = f"cannot be read after {time.monotonic() - began:.0f} s: {fault}"
                    fix = "start again when it can be reached"
                    raise SourceError(what, where, fix, passing=True) from fault
                WEATHER.retried(fault.reason)
                wait = min(2 * wait, _LONGEST_WAIT)


def _wait(seconds: float, given_up: Callable[[], bool]) -> bool:
    """Let time pass; False as soon as the run is asked to stop, for then seconds count."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if WEATHER.stop_requested or given_up():
            return False
        time.sleep(min(left, _LOOK))
    return not WEATHER.stop_requested


def judge(error: OSError, where: str) -> Exception:
    """What an error of a disk means: `Passing`, or a `SourceError` at once."""
    if error.errno in _PASSING:
        return Passing("disk", error.strerror or str(error))
    return SourceError(f"cannot be read: {error.strerror or error}", where, "bring it back, and start again")
