"""How long a forward pass takes on this machine: measured for few networks, predicted for the rest."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.select.footprint import DTYPES

ROUNDS = 101
LEAST_ROUNDS = 5
_LEAST_SAMPLE = 0.001  # seconds; what is shorter is repeated. Less than a slice of the scheduler: few are interrupted
_WARM_UPS = 3
_REACH = 0.25  # of the logarithm of the cost, within which a measured network corrects its neighbours


@dataclass(frozen=True)
class Machine:
    """Where and how a forward pass is timed.

    Attributes:
        device: "cpu" or "cuda".
        threads: of a CPU.
        precision: key of `DTYPES`, of weights and activations.
        batch: images of a pass.
        seconds: about how long a set of networks may be timed, after warming up.
    """

    device: str
    threads: int
    precision: str = "fp32"
    batch: int = 1
    seconds: float = 10.0

    def __str__(self) -> str:
        name = torch.cuda.get_device_name() if self.device == "cuda" else f"CPU, {self.threads} threads"
        return f"{name}, {self.precision}, batch {self.batch}"


def machine_here(device: str | None, threads: int | None, precision: str, batch: int) -> Machine:
    """This machine, with what is left open filled in.

    Raises:
        UserError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here", "--device", "leave it out, or choose cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(device, threads or torch.get_num_threads(), precision, batch)


class Timing(NamedTuple):
    """Seconds of a forward pass: median and quartiles of `rounds` samples."""

    median: float
    low: float
    high: float
    rounds: int


def time_modules(modules: Mapping[str, tuple[nn.Module, Sequence[int]]], machine: Machine) -> dict[str, Timing]:
    """Time forward passes of networks in turns, so that what disturbs the machine disturbs all of them.

    Args:
        modules: by name, with the shape [C, H, W] of an image; they are moved to the device and changed to the
            precision.
        machine: where.
    """
    dtype = DTYPES[machine.precision]
    calls: dict[str, Callable[[], None]] = {}
    for name, (module, image) in modules.items():
        module = module.to(machine.device, dtype).eval()
        x = torch.randn(machine.batch, *image, generator=torch.Generator().manual_seed(0)).to(machine.device, dtype)
        calls[name] = _call(module, x, machine.device)
    with torch.inference_mode(), _threads(machine):
        return time_in_turns(calls, machine.seconds)


def time_in_turns(calls: Mapping[str, Callable[[], None]], seconds: float) -> dict[str, Timing]:
    """Time calls in turns: `LEAST_ROUNDS` rounds, and more up to `ROUNDS` while the time lasts."""
    repeats, samples = {}, {name: [] for name in calls}  # type: dict[str, int], dict[str, list[float]]
    for name, call in calls.items():
        once = min(_seconds(call, 1) for _ in range(_WARM_UPS))
        repeats[name] = max(1, round(_LEAST_SAMPLE / max(once, 1e-9)))
    began = time.perf_counter()
    for done in range(ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for name in calls if done % 2 == 0 else reversed(list(calls)):
            samples[name].append(_seconds(calls[name], repeats[name]))
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


def _call(module: nn.Module, x: torch.Tensor, device: str) -> Callable[[], None]:
    def call() -> None:
        module(x)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def _seconds(call: Callable[[], None], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


@contextmanager
def _threads(machine: Machine) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(machine.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Predictor:
    """Latencies from those of a few networks: a sum of costs, each with a rate of its own that is not negative.

    The rates are fitted to relative errors (non-negative least squares). Where a measured network is near in cost, its
    own error corrects the prediction, fully at the same cost.

    Args:
        costs: by name, what a pass costs: operations, FLOPs, bytes written; all positive.
        measured: seconds by name, of at least one of them.
    """

    def __init__(self, costs: Mapping[str, Sequence[float]], measured: Mapping[str, float]):
        from scipy.optimize import nnls

        self.costs = {name: np.array([1.0, *values]) for name, values in costs.items()}
        self.measured = dict(measured)
        scale = self._rows(measured).max(0)
        seconds = np.array(list(measured.values()))
        rates, _ = nnls(self._rows(measured) / scale / seconds[:, None], np.ones(len(seconds)))
        self._rates = rates / scale
        self._places = np.log(self._rows(measured)[:, 1:])
        self._errors = np.log(seconds / (self._rows(measured) @ self._rates))

    def __call__(self, name: str) -> float:
        """Seconds of a network: as measured, or predicted."""
        if name in self.measured:
            return self.measured[name]
        distance = np.abs(self._places - np.log(self.costs[name][1:])).max(1)
        nearness = np.exp(-((distance / _REACH) ** 2) / 2)
        correction = (nearness * self._errors).sum() / max(nearness.sum(), 1.0)
        return float(self.costs[name] @ self._rates * np.exp(correction))

    def _rows(self, names: Mapping[str, float]) -> np.ndarray:
        return np.array([self.costs[name] for name in names])
