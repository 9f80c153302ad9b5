"""The latency of every network: timed where it matters, predicted elsewhere, and how good predictions are."""

import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from pipeline.elastic import Grid, Subnet
from pipeline.select.choice import Network
from pipeline.select.latency import Machine, Predictor, Timing, time_modules
from pipeline.select.sources import Source

_CHECKS = 3
_BYTES = 4 << 30  # of weights of networks that are timed in turns


class PredictionError(NamedTuple):
    """|predicted / measured - 1| of networks that were predicted before they were timed."""

    median: float
    largest: float
    networks: int


class Times:
    """Fills in `seconds` and `timing` of networks.

    Args:
        sources: whose networks.
        machine: where they are timed.
    """

    def __init__(self, sources: Sequence[Source], machine: Machine):
        self.sources, self.machine = sources, machine
        self._errors: list[float] = []
        self._networks = {name: network for source in sources for name, network in source.networks.items()}

    @property
    def first(self) -> list[str]:
        """Every model that is no part of a run, and of each grid what `design` says."""
        names: list[str] = []
        for source in self.sources:
            chosen = set(design(source.models.grid)) if source.models else set()
            names += [n for n in source.networks if source.models is None or source.subnets[n] in chosen]
        return names

    def begin(self) -> None:
        """Time the first networks and predict the others."""
        self._time(self.first)
        self._predict()

    def confirm(self, names: Sequence[str]) -> None:
        """Time networks that were predicted, learn how far off that was, and predict the others anew.

        All that was timed before takes its turns again: a machine that has become busier meanwhile is busier for all,
        and the error is that of predictions from the same minute.
        """
        before = [name for name, network in self._networks.items() if network.timing]
        self._time([*before, *names])
        for source in self.sources:
            if new := self._measured(source, names):
                predict = Predictor(source.costs, self._measured(source, before))
                self._errors += [abs(predict(name) / seconds - 1) for name, seconds in new.items()]
        self._predict()

    def checks(self) -> list[str]:
        """Networks to time for no other reason than that the error of prediction rests on `_CHECKS` of them."""
        rest = sorted(name for name, network in self._networks.items() if network.timing is None)
        done = len(self._networks) - len(rest) - len(self.first)
        return random.Random(0).sample(rest, max(0, min(_CHECKS - done, len(rest))))

    @property
    def error(self) -> PredictionError | None:
        """None as long as no network was predicted and then timed."""
        if not self._errors:
            return None
        return PredictionError(statistics.median(self._errors), max(self._errors), len(self._errors))

    def _time(self, names: Sequence[str]) -> None:
        for group in self._groups(names):
            modules = {
                name: (source.build(name), source.image)
                for source in self.sources
                for name in group
                if name in source.networks
            }
            for name, timing in time_modules(modules, self.machine).items():
                self._networks[name].timing, self._networks[name].seconds = timing, timing.median

    def _groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        """As many at a time as memory holds; one that does not fit is alone."""
        group: list[str] = []
        for name in names:
            if group and 4 * sum(self._networks[n].params for n in [*group, name]) > _BYTES:
                yield group
                group = []
            group.append(name)
        if group:
            yield group

    def _timing(self, name: str) -> Timing | None:
        return self._networks[name].timing

    def _measured(self, source: Source, names: Iterable[str]) -> dict[str, float]:
        return {n: timing.median for n in names if n in source.networks and (timing := self._timing(n))}

    def _predict(self) -> None:
        for source in self.sources:
            if source.models:
                predictor = Predictor(source.costs, self._measured(source, source.networks))
                for name, network in source.networks.items():
                    network.seconds = predictor(name)


def design(grid: Grid) -> list[Subnet]:
    """The networks from which latencies of a grid are predicted: its corners, and its middle."""
    widths, depths = grid.widths, grid.depths
    middle = Subnet(widths[len(widths) // 2], depths[len(depths) // 2])
    of_width, of_depth, of_ratio = ({0, len(axis) - 1} for axis in (widths, depths, grid.mlp_ratios))
    corners = product(of_width, of_depth, of_ratio)
    return sorted({Subnet(widths[w], depths[d], grid.mlp_ratios[r]) for w, d, r in corners} | {middle})


def copied(networks: Iterable[Network]) -> dict[str, tuple]:
    """What `Times` found, by name, for other ranks to take over."""
    return {network.name: (network.seconds, network.timing) for network in networks}
