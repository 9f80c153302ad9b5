"""The current values of a process's metrics, and how Prometheus's client reads them."""

import json
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from pipeline.measure.metrics import FAMILIES, STEP_BUCKETS


class Values:
    """Current values by metric and label values; plain numbers, so that training pays next to nothing for them."""

    def __init__(self) -> None:
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._buckets = [0] * (len(STEP_BUCKETS) + 1)
        self._sum = 0.0

    def set(self, name: str, value: float, *labels: object) -> None:
        self._values.setdefault(name, {})[tuple(map(str, labels))] = float(value)

    def add(self, name: str, value: float, *labels: object) -> None:
        """Count up; adding 0 makes a counter visible before anything happened, which `increase` needs."""
        series = self._values.setdefault(name, {})
        key = tuple(map(str, labels))
        series[key] = series.get(key, 0.0) + value

    def get(self, name: str, *labels: object) -> float | None:
        return self._values.get(name, {}).get(tuple(map(str, labels)))

    def observe_step(self, seconds: float) -> None:
        """Count a step in the histogram `poa_step_seconds`."""
        self._buckets[bisect_left(STEP_BUCKETS, seconds)] += 1
        self._sum += seconds

    def to_json(self) -> bytes:
        series = {name: [[*labels, value] for labels, value in held.items()] for name, held in self._values.items()}
        return json.dumps({"series": series, "buckets": self._buckets, "sum": self._sum}).encode()


class SnapshotCollector:
    """Presents the last `Values.to_json` that arrived to a registry of prometheus-client."""

    def __init__(self) -> None:
        self.snapshot: dict[str, Any] = {"series": {}, "buckets": [], "sum": 0.0}
        self.scrapes = 0

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        self.scrapes += 1
        snapshot = self.snapshot
        for name, series in snapshot["series"].items():
            family = FAMILIES[name]
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = kind(name.removesuffix("_total"), family.help, labels=family.labels)
            for *labels, value in series:
                metric.add_metric(labels, value)
            yield metric
        if any(snapshot["buckets"]):
            yield HistogramMetricFamily(
                "poa_step_seconds",
                FAMILIES["poa_step_seconds"].help,
                buckets=list(_cumulated(snapshot["buckets"])),
                sum_value=snapshot["sum"],
            )


def _cumulated(buckets: list[int]) -> Iterator[tuple[str, int]]:
    total = 0
    for bound, count in zip([*map(str, STEP_BUCKETS), "+Inf"], buckets, strict=True):
        total += count
        yield bound, total
