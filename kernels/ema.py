"""Moving average of the weights over flat fp32 shards."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.dispatch import use_triton


@torch.no_grad()
def ema_update_(
    ema: Sequence[Tensor],
    masters: Sequence[Tensor],
    momentum: float,
    copies: Sequence[Tensor] | None = None,
    *,
    impl: str,
) -> None:
    """ema += (1 - momentum) * (masters - ema) in place, and the rounded result into `copies`.

    Args:
        ema: contiguous fp32 tensors.
        masters: fp32 tensors of the same shapes.
        momentum: share of the old value that stays.
        copies: tensors of the same shapes in the teacher's dtype, or None.
        impl: "eager" or "triton".

    Raises:
        ValueError: lists of different lengths or shapes, or `impl` is unknown or cannot run here.
    """
    for name, others in (("ema", ema), ("masters", masters), ("copies", ema if copies is None else copies)):
        if [t.shape for t in others] != [t.shape for t in ema]:
            raise ValueError(f"{name}: expected the shapes of ema, {[list(t.shape) for t in ema]}")
        if not all(t.is_contiguous() for t in others):
            raise ValueError(f"{name}: expected contiguous tensors")
    if not ema:
        return
    if use_triton(impl, ema[0]):
        from kernels.fused.ema import ema_update_ as fused

        for i, (average, master) in enumerate(zip(ema, masters, strict=True)):
            fused(average, master, 1 - momentum, None if copies is None else copies[i])
        return
    torch._foreach_lerp_(list(ema), list(masters), 1 - momentum)
    if copies is not None:
        torch._foreach_copy_(list(copies), list(ema))
