"""Triton's interpreter, at half the time.

A kernel's call of another function makes the interpreter look through all of Triton's language for what it has to put
its own things in place of. Once per kernel and module is enough: the language is the same until the kernel ends.
"""

from dataclasses import replace
from types import FunctionType
from typing import Any

from triton.runtime import interpreter

from kernels.fused import optimizer, reduce, residual


def few_programs() -> None:
    """The interpreter takes a program's time whatever its width; the kernels' own widths are tested where they are."""
    patch_once()
    optimizer.BLOCK = 1 << 16
    residual.ROWS = reduce.ROWS = reduce.COLUMN_ROWS = 32


def patch_once() -> None:
    """Let this process's interpreter do so; what it then computes is the same."""
    builder = interpreter.interpreter_builder
    # asked for or not, an overflow is told of in debugging alone: what was computed to see it is thrown away
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch = interpreter._patch_lang
    patched: set[int] = set()  # modules, by their names' dictionary

    def once(function: FunctionType) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None  # of a call within the kernel, which takes nothing back
        is_kernel = not patched
        patched.add(module)
        scope = patch(function)
        if is_kernel and scope is not None:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = once
