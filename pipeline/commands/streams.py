"""Standard streams that cannot end a command: closed ones are opened, and what standard error cannot take is lost."""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, TextIO


@contextmanager
def steady_streams() -> Iterator[None]:
    """While it lasts no message fails to be printed: not for a closed stream, a full disk, a reader that left, or a
    name that the encoding lacks."""
    _fill_descriptors()
    out = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - lives as long as the process
    before = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (out, before):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = _Named(out), _Unfailing(before)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = out, before


def stdout_is_broken() -> bool:
    """Whether nothing can be written there any more; if so the interpreter is kept from trying again at exit."""
    try:
        sys.stdout.flush()
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)
        broken = bool(watched.poll(0))  # no reader is left
    except io.UnsupportedOperation:  # no file
        return False
    except OSError:
        broken = True
    if broken:
        _to_nowhere(sys.stdout)
    return broken


class _Named:
    """A text stream whose errors say that they are of standard output."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with _named():
            return self._stream.write(text)

    def flush(self) -> None:
        with _named():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = "standard output"
        raise


class _Unfailing:
    """A text stream whose writes never fail; a message is not worth a run."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            _to_nowhere(self._stream)
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _fill_descriptors() -> None:
    """The next file that is opened must not become a standard stream, which libraries write to."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor < 3:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def _to_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)
