"""Buffers of the engine, in elements; apart from it so that `poa plan` reads them without torch."""

BUCKET = 25_000_000
"""Gradients reduced, or weights gathered, in one collective. At stages 0 to 2 the last of a step's gradients travel
while nothing is computed; at stage 3 it is no more than the largest block."""

PERSISTENT = 100_000
"""Parameters of at most this size stay gathered under ZeRO-3."""
