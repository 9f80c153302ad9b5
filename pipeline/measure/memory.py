"""Memory of a device, or of the process where there is none."""

import resource
from pathlib import Path

import torch


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Memory in use by kind; the last kind is the peak."""
    if device.type == "cuda":
        return {
            "capacity": torch.cuda.get_device_properties(device).total_memory,
            "reserved": torch.cuda.memory_reserved(device),
            "allocated": torch.cuda.memory_allocated(device),
            "peak": torch.cuda.max_memory_allocated(device),
        }
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {
        "resident": pages * resource.getpagesize(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
