"""The stop watch of a step."""

import torch

from pipeline.measure import phases
from pipeline.measure.metrics import PHASES
from pipeline.measure.phases import Phases


def test_phases_add_up_to_the_time_that_passed(monkeypatch):
    clock = iter([0.0, 10.0, 11.0, 13.0, 16.0, 20.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))
    watch = Phases(torch.device("cpu"))
    watch.start()
    assert watch.waited_for_data() == 1.0
    watch.lap("teacher")
    watch.lap("backward")
    watch.lap("teacher")
    watch.add("checkpoint", 5.0)
    expected = {"data_wait": 1.0, "teacher": 6.0, "backward": 3.0, "checkpoint": 5.0}
    assert watch.seconds == {phase: expected.get(phase, 0.0) for phase in PHASES}
