"""The moving average of the weights."""

import pytest
import torch

from kernels.ema import ema_update_

SIZES = (1, 7, 2048, 2049, 5000, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None], ids=str)
def test_average_and_copies_match_fp64(dtype: torch.dtype | None, impl: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ema = [torch.randn(n, generator=generator).to(device) for n in SIZES]
    masters = [torch.randn(n, generator=generator).to(device) for n in SIZES]
    copies = None if dtype is None else [torch.empty(n, dtype=dtype, device=device) for n in SIZES]
    oracle = [e.double() * 0.992 + m.double() * 0.008 for e, m in zip(ema, masters, strict=True)]
    ema_update_(ema, masters, 0.992, copies, impl=impl)
    for average, exact in zip(ema, oracle, strict=True):
        torch.testing.assert_close(average.double(), exact, rtol=3e-7, atol=3e-7)
    for copy, average in zip(copies or [], ema, strict=bool(copies)):
        torch.testing.assert_close(copy.float(), average, rtol=torch.finfo(copy.dtype).eps, atol=0)


def test_momentum_near_one_still_moves_the_average(impl: str, device: str) -> None:
    """Where an average kept in bf16 would stall."""
    ema, masters = [torch.ones(100, device=device)], [torch.full((100,), 2.0, device=device)]
    for _ in range(100):
        ema_update_(ema, masters, 0.9999, impl=impl)
    torch.testing.assert_close(ema[0], torch.full((100,), 2 - 0.9999**100, device=device), rtol=1e-5, atol=0)


def test_wrong_tensors_are_refused(impl: str, device: str) -> None:
    ema = [torch.zeros(4, 4, device=device)]
    with pytest.raises(ValueError, match=r"masters: expected the shapes of ema, \[\[4, 4\]\]"):
        ema_update_(ema, [torch.zeros(16, device=device)], 0.9, impl=impl)
    with pytest.raises(ValueError, match="copies: expected the shapes of ema"):
        ema_update_(ema, ema, 0.9, [], impl=impl)
    with pytest.raises(ValueError, match="masters: expected contiguous tensors"):
        ema_update_(ema, [torch.zeros(4, 4, device=device).t()[:, :]], 0.9, impl=impl)
