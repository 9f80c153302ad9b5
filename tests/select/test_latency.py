"""Latencies: taken in turns, predicted from costs that are known to be right."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.select import latency
from pipeline.select.latency import Machine, Predictor, machine_here, time_in_turns, time_modules

RATES = np.array([2e-4, 5e-6, 1e-11, 3e-10])  # seconds: fixed, per operation, per FLOP, per byte


def costs_of(width: int, depth: int) -> tuple[float, float, float]:
    return 12.0 * depth + 5, depth * 2e5 * width**2, depth * 4e4 * width


def seconds_of(costs: tuple[float, float, float]) -> float:
    return float(RATES @ np.array([1.0, *costs]))


GRID = {f"{w}x{d}": costs_of(w, d) for w in (64, 96, 128) for d in (2, 4, 6)}
CORNERS = ("64x2", "64x6", "128x2", "128x6", "96x4")


def test_latencies_that_are_sums_of_costs_are_predicted_exactly():
    predictor = Predictor(GRID, {name: seconds_of(GRID[name]) for name in CORNERS})
    for name, costs in GRID.items():
        assert predictor(name) == pytest.approx(seconds_of(costs), rel=1e-6)


def test_a_measured_network_is_not_predicted_and_corrects_its_neighbours():
    measured = {name: seconds_of(GRID[name]) for name in CORNERS}
    plain = Predictor(GRID, measured)("96x6")
    corrected = Predictor(GRID, measured | {"96x4": 2 * measured["96x4"]})
    assert corrected("96x4") == 2 * measured["96x4"]
    assert corrected("96x6") > 1.1 * plain


def test_predictions_are_never_negative_whatever_was_measured():
    predictor = Predictor(GRID, {"64x2": 3.0, "128x6": 1.0, "96x4": 2.0})
    assert all(predictor(name) > 0 for name in GRID)


def test_networks_take_turns_and_the_order_turns_round(monkeypatch):
    calls: list[str] = []
    clock = iter(range(10**6))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock) * 0.01)
    timings = time_in_turns({name: lambda name=name: calls.append(name) for name in "abc"}, seconds=0)
    warm = 3 * latency._WARM_UPS
    assert calls[:warm] == [name for name in "abc" for _ in range(latency._WARM_UPS)]
    assert "".join(calls[warm:]) == ("abc" + "cba") * (latency.LEAST_ROUNDS // 2) + "abc" * (latency.LEAST_ROUNDS % 2)
    assert {t.rounds for t in timings.values()} == {latency.LEAST_ROUNDS}
    assert all(t.low <= t.median <= t.high for t in timings.values())


def test_modules_compute_in_the_precision_and_batch_that_are_asked_for():
    seen: list[tuple] = []

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            seen.append(
                (x.shape, x.dtype, self.scale.dtype, torch.get_num_threads(), torch.is_inference_mode_enabled())
            )
            return x * self.scale

    before = torch.get_num_threads()
    time_modules({"a": (Looking(), (3, 8, 8))}, Machine("cpu", 1, "bf16", 4, seconds=0))
    assert set(seen) == {(torch.Size([4, 3, 8, 8]), torch.bfloat16, torch.bfloat16, 1, True)}
    assert torch.get_num_threads() == before


def test_a_device_that_is_not_here_is_refused():
    assert machine_here("cpu", 3, "fp32", 2) == Machine("cpu", 3, "fp32", 2)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            machine_here("cuda", None, "fp32", 1)
