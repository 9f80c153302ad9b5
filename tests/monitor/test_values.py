"""Current values and how they are exposed."""

import json

from pipeline.monitor.values import SnapshotCollector, Values


def test_counters_are_seen_at_zero_before_they_count():
    values, collector = Values(), SnapshotCollector()
    values.add("poa_bad_steps_total", 0, "total")
    collector.snapshot = json.loads(values.to_json())
    (metric,) = collector.collect()
    assert [(s.name, s.labels, s.value) for s in metric.samples] == [("poa_bad_steps_total", {"term": "total"}, 0.0)]
    values.add("poa_bad_steps_total", 2, "total")
    values.add("poa_bad_steps_total", 1, "total")
    assert values.get("poa_bad_steps_total", "total") == 3
