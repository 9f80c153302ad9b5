"""The arithmetic peak of a device, against which utilization is measured."""

import time
from functools import cache
from typing import NamedTuple

import torch

# Dense bf16 TFLOP/s of the makers' data sheets, by part of the device's name; fp32 runs on the matrix units as TF32.
_DATASHEET = {"H200": 989.4, "H100 PCIe": 756.4, "H100": 989.4, "A100": 311.8, "L40S": 362.1, "A10": 125.0}
_TF32_SHARE = 0.5
_LONG = 0.05  # seconds of a product on a CPU, after which no larger one is tried


class Peak(NamedTuple):
    """FLOP/s of one device and where the figure comes from: "datasheet" or "measured"."""

    flops: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The data sheet's peak of a known GPU; of any other device the best of some matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, tera in _DATASHEET.items():
            if part in name and (dtype == torch.bfloat16 or torch.backends.cuda.matmul.allow_tf32):
                return Peak(tera * 1e12 * (1.0 if dtype == torch.bfloat16 else _TF32_SHARE), "datasheet")
    return Peak(_measure(device, dtype, torch.get_num_threads()), "measured")


@cache  # for a process that trains again, or is forked from one that has measured
def _measure(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """The best product with a transpose, as layers multiply: some CPU libraries take five times as long for bf16 else.

    A CPU whose libraries multiply a dtype number by number is known by the small products.
    """
    best = 0.0
    for size in [8192] * 5 if device.type == "cuda" else [256, 256, 512, 1024, 1024]:
        a = torch.ones(size, size, device=device, dtype=dtype)
        began = _clock(device, threads)
        torch.nn.functional.linear(a, a)
        seconds = _clock(device, threads) - began
        best = max(best, 2 * size**3 / seconds)
        if device.type == "cpu" and seconds > _LONG:
            break
    return best


def _clock(device: torch.device, threads: int) -> float:
    """Seconds; on a CPU those that its threads worked, so that other load does not lower the peak."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() / threads
