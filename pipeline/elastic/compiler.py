"""torch's compiler stays out of a process that compiles nothing.

It is half of all the modules that training would import, and libraries want it only to decorate functions of theirs at
import, which training then never calls.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

import torch

_COMPILER, _UTILS = "torch._dynamo", "torch._dynamo.utils"


@contextmanager
def compiler_deferred() -> Iterator[None]:
    """While it is open, what would import the compiler at once does so when it is needed; all is as before afterwards.

    It is needed when a function that was to be compiled is called. One that was not to be compiled needs it only where
    there is a compiler. torchvision takes a function from a module of the compiler's, for which another one stands in;
    who takes anything else from that gets the real one.
    """
    if _COMPILER in sys.modules:
        yield
        return
    compile_, disable = torch.compile, torch.compiler.disable
    torch.compile = _deferring_compile(compile_)
    torch.compiler.disable = _deferring_disable(disable)
    sys.modules.setdefault(_UTILS, _Utils(_UTILS))
    try:
        yield
    finally:
        torch.compile, torch.compiler.disable = compile_, disable
        _Utils.make_way()


class _Utils(ModuleType):
    """Stands in for the module of `is_compile_supported`, which torchvision imports long before it calls it."""

    @staticmethod
    def is_compile_supported(*args: Any) -> Any:
        return import_module(_UTILS).is_compile_supported(*args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.make_way()
        return getattr(import_module(_UTILS), name)

    @staticmethod
    def make_way() -> None:
        if isinstance(sys.modules.get(_UTILS), _Utils):
            del sys.modules[_UTILS]


def _deferring_compile(compile_: Callable[..., Any]) -> Callable[..., Any]:
    def deferring(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(deferring, **options)
        if not isinstance(model, FunctionType):
            return compile_(model, **options)
        compiled = functools.cache(lambda: compile_(model, **options))
        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    return deferring


def _deferring_disable(disable: Callable[..., Any]) -> Callable[..., Any]:
    def deferring(fn: Any = None, *options: Any, **more: Any) -> Any:
        if fn is None:
            return lambda found: deferring(found, *options, **more)
        if not isinstance(fn, FunctionType):
            return disable(fn, *options, **more)
        disabled = functools.cache(lambda: disable(fn, *options, **more))
        return functools.wraps(fn)(lambda *args, **kw: (disabled() if _COMPILER in sys.modules else fn)(*args, **kw))

    return deferring
