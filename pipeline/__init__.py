"""POA: pre-train once, ship every size."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.models.loading import load_subnet

__all__ = ["load_subnet"]


def __getattr__(name: str) -> Any:
    if name == "load_subnet":  # on first use, for it needs torch
        from pipeline.models.loading import load_subnet

        return load_subnet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
