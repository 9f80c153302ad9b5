"""Memory of a device, or of the process where there is none."""

import resource
from pathlib import Path

import torch


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Memory in use by kind; the last kind is the peak.

    On a GPU `outside` is what is in use beside torch's own: DALI's and NCCL's buffers, kernels, and other processes.
    """
    if device.type == "cuda":
        free, capacity = torch.cuda.mem_get_info(device)
        return {
            "capacity": capacity,
            "outside": capacity - free - torch.cuda.memory_reserved(device),
            "reserved": torch.cuda.memory_reserved(device),
            "allocated": torch.cuda.memory_allocated(device),
            "peak": torch.cuda.max_memory_allocated(device),
        }
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {
        "resident": pages * resource.getpagesize(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
