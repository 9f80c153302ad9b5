"""Buffers of the engine, in elements; apart from it so that `poa plan` reads them without torch."""

BUCKET = 50_000_000
"""Gradients reduced, or weights gathered, in one collective; under ZeRO-3 no more than the largest block."""

PERSISTENT = 100_000
"""Parameters of at most this size stay gathered under ZeRO-3."""
