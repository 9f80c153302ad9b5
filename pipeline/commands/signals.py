"""A signal that ends a command ends it as an error does: what is half done is cleaned up."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_NUMBERS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(SystemExit):
    """Asked to end; the exit code is a shell's for that signal."""

    @property
    def name(self) -> str:
        return signal.Signals(int(self.code or 0) - 128).name


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Stopped` where a time limit or a lost terminal would kill the process.

    Not in one of several ranks: it would first wait for peers that are gone.
    """
    alone = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")) in ("", "1")
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    ours = [number for number, handler in before.items() if alone and handler is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _stop(number: int, _frame: Any) -> NoReturn:
    for again in _NUMBERS:  # a second one would end the cleaning up half way
        signal.signal(again, signal.SIG_IGN)
    raise Stopped(128 + number)
