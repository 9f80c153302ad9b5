"""Event files."""

import time

from pipeline.monitor.tensorboard import EventFile


def test_tensorboard_reads_the_records_and_forgets_steps_done_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = EventFile(tmp_path, 0)
    for step in (1, 2, 3):
        first.add({"step": step, "time": 100.0 + step, "loss": 1.0 / step, "subnet": "1x1", "bad": ["x"]})
    first.add({"step": 4, "time": 104.0, "loss": float("nan"), "lr": 0.1})
    first.close()
    time.sleep(1.1)  # file names, by which TensorBoard orders, count whole seconds
    second = EventFile(tmp_path, 2)
    second.add({"step": 3, "time": 200.0, "loss": 7.0})
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "lr"]
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 7.0)]
