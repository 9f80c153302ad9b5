"""How calls are timed on a device, and the ceilings that their times are held against."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass
class Clock:
    """Medians of calls on one device."""

    device: torch.device
    repeats: int

    def median_ms(self, call: Callable[[int], Any]) -> float:
        """Median time of `call(i)`, i counting the calls, after two that warm up."""
        for i in range(2):
            call(i)
        return statistics.median(self.once_ms(partial(call, i)) for i in range(self.repeats))

    def once_ms(self, call: Callable[[], Any]) -> float:
        """Time of one call: on the CPU processor time, on a GPU between events."""
        if self.device.type == "cpu":
            start = time.process_time()
            call()
            return 1e3 * (time.process_time() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # while the GPU is busy here, the CPU queues the whole call: launches cost nothing, as in a long step
        torch.cuda._sleep(20_000_000)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def peak_mib(self, call: Callable[[], Any]) -> float | None:
        """Memory that a call allocates beyond its inputs; None on the CPU, where PyTorch does not count it."""
        if self.device.type == "cpu":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(clock: Clock, dtype: torch.dtype, scale: str) -> dict[str, float]:
    """Bytes per second of a copy (read and write counted) and FLOP per second of a square matrix product."""
    elements, side = {"full": (1 << 29, 8192), "cpu": (1 << 25, 1024), "tiny": (1 << 16, 64)}[scale]
    source = torch.ones(elements, device=clock.device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms = clock.median_ms(lambda _: target.copy_(source))
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    matmul_ms = clock.median_ms(lambda _: a @ b)
    return {
        "copy_bytes_per_s": 2 * source.nbytes / copy_ms * 1e3,
        "matmul_flop_per_s": 2 * side**3 / matmul_ms * 1e3,
    }
