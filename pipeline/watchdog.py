"""Ends a process that has stopped making steps, saying where it hangs."""

import faulthandler
import os
import sys
import threading
import time


class Watchdog:
    """Dumps every thread's stack and exits with code 1 if no beat comes for `timeout_seconds`.

    A hung collective cannot be interrupted from Python, so the process is ended from a thread of its own.
    """

    def __init__(self, rank: int, timeout_seconds: float):
        self.rank, self.timeout_seconds = rank, timeout_seconds
        self._phase, self._since = "start", time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, phase: str) -> None:
        """Note that the process is alive and what it does next."""
        self._phase, self._since = phase, time.monotonic()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(min(self.timeout_seconds / 4, 5.0)):
            silent = time.monotonic() - self._since
            if silent > self.timeout_seconds:
                print(f"error: rank {self.rank} hangs in {self._phase!r} for {silent:.0f} s", file=sys.stderr)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(1)
