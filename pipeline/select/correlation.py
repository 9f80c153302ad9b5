"""How far to trust a score: its rank correlation with the accuracy that it stands for."""

import math
from collections.abc import Sequence
from typing import NamedTuple

FEWEST = 5
_TWO_SIDED_95 = 1.959964


class Correlation(NamedTuple):
    """Spearman's rho over `networks`, with its 95% interval (nan where there are fewer than `FEWEST`)."""

    rho: float
    low: float
    high: float
    networks: int

    def as_json(self) -> dict[str, float | int | None]:
        return {key: None if math.isnan(value) else value for key, value in self._asdict().items()}

    def __str__(self) -> str:
        if math.isnan(self.rho):
            return f"no ranking among {self.networks}"
        interval = f"{self.low:+.2f} to {self.high:+.2f}" if math.isfinite(self.low) else "too few for an interval"
        return f"{self.rho:+.2f} ({interval}; {self.networks} networks)"


def spearman(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Spearman's rank correlation; the interval by Fisher's z with the variance (1 + rho^2 / 2) / (n - 3).

    The variance is that of Bonett and Wright (2000). The networks of a run share their weights, so they are no
    independent sample: the interval says how well so few points fix the ranking, not what another run would show.
    """
    from scipy.stats import spearmanr

    count = len(x)
    if count < 2 or len(set(x)) == 1 or len(set(y)) == 1:
        return Correlation(math.nan, math.nan, math.nan, count)
    rho = float(spearmanr(x, y).statistic)
    if count < FEWEST:
        return Correlation(rho, math.nan, math.nan, count)
    z = math.atanh(max(min(rho, 1 - 1e-12), -1 + 1e-12))
    half = _TWO_SIDED_95 * math.sqrt((1 + rho * rho / 2) / (count - 3))
    return Correlation(rho, math.tanh(z - half), math.tanh(z + half), count)
