"""Random numbers as pure functions of (seed, purpose, place): counter-based Philox, so no state is ever saved."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Separate streams under one seed; the values are part of every run's reproducibility."""

    SHARDS = 1
    SAMPLES = 2
    AUGMENT = 3
    SUBSTITUTE = 4
    MASKS = 5
    PACK = 6
    MIX = 7
    LINE = 8
    CHANNELS = 9


def philox(
    seed: int, purpose: Purpose, a: int = 0, b: int = 0, *, source: int = 0, block: int = 0
) -> np.random.Generator:
    """A generator for one place of one stream.

    Args:
        a, b: the place, e.g. (epoch, window) or (position, attempt).
        source: streams of their own for several sources.
        block: blocks of four 64-bit draws to skip; consecutive blocks continue one another.
    """
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[block, source, b, a]))
