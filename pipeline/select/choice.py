"""The choice itself: limits, Pareto fronts, the best network that fits, and what to say if none does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.select.latency import Timing


class Cost(NamedTuple):
    """One thing that a network costs.

    Attributes:
        title: in tables and plots.
        unit: that people read it in.
        scale: of that unit.
        option: that limits it.
    """

    title: str
    unit: str
    scale: float
    option: str

    def show(self, value: float) -> str:
        return f"{value / self.scale:.3g} {self.unit}".strip()


COSTS = {
    "params": Cost("parameters", "M", 1e6, "--max-params"),
    "gflops": Cost("GFLOPs per image", "", 1.0, "--max-gflops"),
    "memory": Cost("memory of a pass", "MB", 1e6, "--max-memory"),
    "seconds": Cost("latency", "ms", 1e-3, "--max-ms"),
}


class Quality(NamedTuple):
    """One way to say how good a network is.

    Attributes:
        title: in tables and plots.
        percent: shown as a percentage.
        sign: -1 where less is better.
        label_free: needs no labels.
    """

    title: str
    percent: bool
    sign: int
    label_free: bool

    def show(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else f"{value:.4g}"


QUALITIES = {
    "knn": Quality("20-NN accuracy %", True, 1, False),
    "linear": Quality("linear accuracy %", True, 1, False),
    "agreement": Quality("agreement with the teacher %", True, 1, True),
    "rank": Quality("effective rank", False, 1, True),
    "loss": Quality("elastic loss", False, -1, True),
}


@dataclass
class Network:
    """A network that could be shipped.

    Attributes:
        name: of the sub-network or directory; with the run's name before it if there are several runs.
        source: the run or model directory.
        params: number of parameters.
        gflops: of a forward pass over one image.
        activations: most bytes of activations alive at a time in a pass.
        memory: bytes of weights and activations.
        rival: it is no part of a run.
        seconds: of a forward pass, predicted until `timing` is there; None if nobody asked.
        timing: as measured.
        quality: by key of `QUALITIES`.
    """

    name: str
    source: str
    params: int
    gflops: float
    activations: float
    memory: float
    rival: bool = False
    seconds: float | None = None
    timing: Timing | None = None
    quality: dict[str, float] = field(default_factory=dict)

    def cost(self, key: str) -> float | None:
        return getattr(self, key)

    def as_json(self) -> dict[str, Any]:
        ms = None if self.seconds is None else 1e3 * self.seconds
        spread = None if self.timing is None else [1e3 * self.timing.low, 1e3 * self.timing.high]
        return {
            **{k: getattr(self, k) for k in ("name", "source", "params", "gflops", "activations", "memory", "rival")},
            "ms": ms,
            "ms_quartiles": spread,
            "quality": self.quality,
        }


Limits = Mapping[str, float]
"""Largest value by key of `COSTS`."""


def excess(network: Network, limits: Limits, slack: float = 1.0) -> dict[str, float]:
    """How many times each limit a network takes; what is not known takes nothing.

    Args:
        network: which.
        limits: which.
        slack: by which a latency that is a prediction may exceed its limit.
    """
    doubt = {"seconds": slack} if network.timing is None else {}
    return {key: (network.cost(key) or 0.0) / (limit * doubt.get(key, 1.0)) for key, limit in limits.items()}


def fits(network: Network, limits: Limits, slack: float = 1.0) -> bool:
    return all(ratio <= 1 for ratio in excess(network, limits, slack).values())


def front(networks: Sequence[Network], cost: str, quality: str) -> list[Network]:
    """The networks that no other beats: cheaper than all that are as good, by rising cost."""
    known = [n for n in networks if n.cost(cost) is not None and quality in n.quality]
    sign = QUALITIES[quality].sign
    best: list[Network] = []
    for network in sorted(known, key=lambda n: (n.cost(cost), -sign * n.quality[quality])):
        if not best or sign * network.quality[quality] > sign * best[-1].quality[quality]:
            best.append(network)
    return best


def on_any_front(networks: Sequence[Network], quality: str) -> list[Network]:
    """The networks on the front of at least one cost, best first."""
    found = {n.name: n for cost in COSTS for n in front(networks, cost, quality)}
    return ranked(found.values(), quality)


def ranked(networks: Any, quality: str) -> list[Network]:
    """Best first; of equals the cheapest."""
    sign = QUALITIES[quality].sign
    known = [n for n in networks if quality in n.quality]
    return sorted(known, key=lambda n: (-sign * n.quality[quality], n.seconds or 0.0, n.gflops, n.params))


def require_fit(networks: Sequence[Network], limits: Limits) -> None:
    """Refuse limits that no network keeps.

    Raises:
        UserError: with the network that comes nearest to keeping all of them, and the limit that it misses by most.
    """
    if any(fits(network, limits) for network in networks):
        return
    nearest = min(networks, key=lambda n: max(excess(n, limits).values()))
    ratios = excess(nearest, limits)
    tightest = max(ratios, key=lambda key: ratios[key])
    cost = COSTS[tightest]
    takes = nearest.cost(tightest)
    assert takes is not None
    others = [COSTS[key].option for key in ratios if key != tightest and ratios[key] > 1]
    besides = f", and loosen {' and '.join(others)}" if others else ""
    raise UserError(
        f"no network fits: of the limits {cost.option} {cost.show(limits[tightest])} is the tightest, and the nearest "
        f"network, {nearest.name}, takes {cost.show(takes)}",
        cost.option,
        f"allow {cost.show(takes * 1.001)}{besides}, or train a grid with smaller networks",
    )
