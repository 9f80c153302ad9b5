"""A store, for what plan and doctor say of data in one."""

from faulty_store import quick, serve

__all__ = ["quick", "serve"]
