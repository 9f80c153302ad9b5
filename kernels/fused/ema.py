"""Moving average and its low-precision copy in one pass over flat memory."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit(do_not_specialize_on_alignment=["size"])
def _kernel(ema, master, copy, size, weight, COPY: tl.constexpr, BLOCK: tl.constexpr):
    ids = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < size
    old = tl.load(ema + ids, mask=inside)
    new = old + weight * (tl.load(master + ids, mask=inside) - old)
    tl.store(ema + ids, new, mask=inside)
    if COPY:
        tl.store(copy + ids, new.to(copy.dtype.element_ty), mask=inside)


def ema_update_(ema: Tensor, master: Tensor, weight: float, copy: Tensor | None) -> None:
    """ema += weight * (master - ema) over contiguous fp32 tensors, rounded into `copy` as well."""
    if ema.numel():
        grid = (triton.cdiv(ema.numel(), BLOCK),)
        _kernel[grid](ema, master, copy, ema.numel(), weight, COPY=copy is not None, BLOCK=BLOCK)
