"""A store that misbehaves, for all tests of what reads from stores."""

from faulty_store import quick, serve

__all__ = ["quick", "serve"]
