"""What passes is waited for; what does not ends the run by name. Neither is a reason to leave a sample out."""

import errno
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from pipeline.errors import UserError

PATIENCE = 600.0  # seconds
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 20.0
_LOOK = 0.5  # seconds between two looks for a wish to stop
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
        waited: seconds that reads from stores took, over all threads.
        fetched: bytes of samples from stores, by name of the source.
        patience: seconds until what may pass is given up.
        stop_requested: not empty once the run was asked to stop; whoever waits then gives up.
    """

    def __init__(self) -> None:
        self.retries: Counter[str] = Counter()
        self.waited = 0.0
        self.fetched: Counter[str] = Counter()
        self.patience: float | None = None
        self.stop_requested: Sequence[int] = ()
        self._lock = threading.Lock()

    def retried(self, reason: str) -> None:
        with self._lock:
            self.retries[reason] += 1

    def read(self, source: str, size: int, seconds: float) -> None:
        """A sample was read from a store."""
        with self._lock:
            self.fetched[source] += size
            self.waited += seconds


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
) -> T:
    """What `attempt` gives, tried again after longer and longer waits while it raises `Passing`.

    Args:
        where: what is read, for messages.
        patience: seconds until it is given up; that of the run by default, or `PATIENCE`.

    Raises:
        SourceError: patience is spent, or the run was asked to stop.
    """
    patience = next(seconds for seconds in (patience, WEATHER.patience, PATIENCE) if seconds is not None)
    began, wait = time.monotonic(), _FIRST_WAIT
    give_up = began + patience
    while True:
        try:
            return attempt()
        except Passing as fault:
            pause = wait * random.uniform(0.5, 1.5)  # ranks that failed together must not come back together
            if time.monotonic() + pause > give_up or not _wait(pause):
                what = f"cannot be read after {time.monotonic() - began:.0f} s: {fault}"
                fix = "start again when it can be reached"
                raise SourceError(what, where, fix, passing=True) from fault
            WEATHER.retried(fault.reason)
            wait = min(2 * wait, _LONGEST_WAIT)


def _wait(seconds: float) -> bool:
    """Let time pass; False as soon as the run is asked to stop, for then seconds count."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if WEATHER.stop_requested:
            return False
        time.sleep(min(left, _LOOK))
    return not WEATHER.stop_requested


def judge(error: OSError, where: str) -> Exception:
    """What an error of a disk means: `Passing`, or a `SourceError` at once."""
    if error.errno in _PASSING:
        return Passing("disk", error.strerror or str(error))
    return SourceError(f"cannot be read: {error.strerror or error}", where, "bring it back, and start again")
