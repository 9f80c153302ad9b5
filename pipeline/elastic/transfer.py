"""Between host and device without waiting for what the device has still to do."""

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """Copy a small tensor; from pageable memory the host would wait for its turn."""
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class Late:
    """A tensor on its way to the host. Reading it waits until the device has made it, not for what comes after it.

    Args:
        values: must not be changed any more.
    """

    def __init__(self, values: Tensor):
        self._host, self._made = values, None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self._made = torch.cuda.Event()
            self._made.record()

    def tolist(self) -> list:
        if self._made is not None:
            self._made.synchronize()
        return self._host.tolist()
