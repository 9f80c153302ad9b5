"""Imports of what computes, and the end of a process that has them, at half of what they would cost."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import without torch's compiler, and keep Python's cycle collector away from what imports make, also at exit.

    These are more than half a million objects that live as long as the process. Looking for garbage among them takes a
    fifth of the time of the imports, and as long again when the interpreter shuts down. A process that has torch
    already is left alone: what is garbage there would stay for good.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        from pipeline.elastic.compiler import compiler_deferred

        with compiler_deferred():
            yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)  # what is imported later
