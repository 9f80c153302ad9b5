"""How a step's time divides into phases, on the clock of the device that does the work."""

import time
from collections import deque

import torch

from pipeline.measure.metrics import PHASES


class Phases:
    """A stop watch whose laps have names. On a GPU laps are events of its stream, so nothing waits for the device.

    Args:
        device: where the step runs.

    Attributes:
        seconds: by phase, since the process started; on a GPU the last few laps are still missing.
    """

    def __init__(self, device: torch.device):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._cuda = device.type == "cuda"
        self._mark = time.perf_counter()
        self._last_event: torch.cuda.Event | None = None
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        """Begin a step, which waits for data first: on the host, whatever the device still does."""
        self._settle()
        self._mark = time.perf_counter()

    def waited_for_data(self) -> float:
        """End the wait for data; seconds it took."""
        seconds = time.perf_counter() - self._mark
        self.seconds["data_wait"] += seconds
        self._mark += seconds
        if self._cuda:
            self._last_event = self._event()
        return seconds

    def lap(self, phase: str) -> None:
        """Attribute the time since the last lap to `phase`."""
        if self._cuda:
            event = self._event()
            if self._last_event is not None:
                self._pending.append((phase, self._last_event, event))
            self._last_event = event
            return
        now = time.perf_counter()
        self.seconds[phase] += now - self._mark
        self._mark = now

    def add(self, phase: str, seconds: float) -> None:
        """Attribute time measured elsewhere."""
        self.seconds[phase] += seconds

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self) -> None:
        """Add up the laps that the device has finished."""
        while self._pending and self._pending[0][2].query():
            phase, began, ended = self._pending.popleft()
            self.seconds[phase] += began.elapsed_time(ended) / 1000
