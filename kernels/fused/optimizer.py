"""AdamW, the moving average and both copies, every element read once and written once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _load(vector, ids, inside, MASKED: tl.constexpr):
    return tl.load(vector + ids, mask=inside) if MASKED else tl.load(vector + ids)


@triton.jit
def _store(vector, ids, value, inside, MASKED: tl.constexpr):
    value = value.to(vector.dtype.element_ty)
    if MASKED:
        tl.store(vector + ids, value, mask=inside)
    else:
        tl.store(vector + ids, value)


@triton.jit
def _update(
    master, gradient, first, second, ema, student, teacher, ids, inside, factor, rate, kept, unbias_first,
    unbias_second, beta1, beta2, rest1, rest2, eps, weight, STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    g = _load(gradient, ids, inside, MASKED).to(tl.float32) * factor
    m = _load(first, ids, inside, MASKED)
    m += rest1 * (g - m)
    v = beta2 * _load(second, ids, inside, MASKED) + rest2 * g * g
    w = _load(master, ids, inside, MASKED) * kept
    w -= rate * unbias_first * tl.div_rn(m, tl.sqrt_rn(v) * unbias_second + eps)
    old = _load(ema, ids, inside, MASKED)
    average = old + weight * (w - old)
    _store(first, ids, m, inside, MASKED)
    _store(second, ids, v, inside, MASKED)
    _store(master, ids, w, inside, MASKED)
    _store(ema, ids, average, inside, MASKED)
    if STUDENT:
        _store(student, ids, w, inside, MASKED)
    if TEACHER:
        _store(teacher, ids, average, inside, MASKED)


@triton.jit(do_not_specialize=["frozen"])
def _kernel(
    master, gradient, first, second, ema, student, teacher, tiles, kinds, scales, scalars, lr, weight_decay,
    beta1, beta2, rest1, rest2, eps, weight, frozen, STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`scalars` are the flag, the inverse bias corrections of both moments, and the parts' factors."""
    if tl.load(scalars) == 0:
        return
    tile = tiles + 4 * tl.program_id(0)
    block, low, high, segment = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    part, decayed = tl.load(kinds + 2 * segment), tl.load(kinds + 2 * segment + 1)
    thawed = 1 - ((frozen >> part) & 1).to(tl.float32)
    rate = lr * tl.load(scales + segment) * thawed
    kept = 1 - rate * weight_decay * decayed.to(tl.float32)
    factor = tl.load(scalars + 3 + part)
    unbias_first, unbias_second = tl.load(scalars + 1), tl.load(scalars + 2)
    within = tl.arange(0, BLOCK)
    ids = block.to(tl.int64) * BLOCK + within
    # a mask that starts anywhere would cost the wide loads and stores of whole blocks
    if high - low == BLOCK:
        _update(
            master, gradient, first, second, ema, student, teacher, ids, within >= 0, factor, rate, kept,
            unbias_first, unbias_second, beta1, beta2, rest1, rest2, eps, weight, STUDENT, TEACHER, False,
        )  # fmt: skip
    else:
        _update(
            master, gradient, first, second, ema, student, teacher, ids, (within >= low) & (within < high), factor,
            rate, kept, unbias_first, unbias_second, beta1, beta2, rest1, rest2, eps, weight, STUDENT, TEACHER, True,
        )  # fmt: skip


def tables(
    segments: Sequence[tuple[int, int, int, float, bool]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What a program looks up.

    Args:
        segments: start, length, part, multiplier of the learning rate and decay of each.
        device: of the shard.

    Returns:
        Tiles int32 `[T, 4]`: a block, the elements of it that are in one segment (from, to), and that segment; part and
        decay of each segment, int32 `[S, 2]`; its multiplier of the learning rate, fp32 `[S]`.
    """
    tiles = []
    for index, (start, length, *_) in enumerate(segments):
        blocks = torch.arange(start // BLOCK, -(-(start + length) // BLOCK))
        low = (start - blocks * BLOCK).clamp(min=0)
        high = (start + length - blocks * BLOCK).clamp(max=BLOCK)
        tiles.append(torch.stack([blocks, low, high, torch.full_like(blocks, index)], 1))
    kinds = torch.tensor([(part, int(decayed)) for _, _, part, _, decayed in segments])
    scales = torch.tensor([scale for _, _, _, scale, _ in segments], dtype=torch.float32)
    return torch.cat(tiles).int().to(device), kinds.int().to(device), scales.to(device)


def update_(
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    copies: tuple[Tensor | None, Tensor | None],
    gradient: Tensor,
    looked_up: tuple[Tensor, Tensor, Tensor],
    scalars: Tensor,
    lr: float,
    weight_decay: float,
    momentum: float,
    betas: tuple[float, float],
    eps: float,
    frozen: int,
) -> None:
    """One launch over the shard.

    Args:
        vectors: fp32 weights, both moments and moving average, changed in place.
        copies: of weights and average, in lower precision.
        gradient: flat, contiguous.
        looked_up: see `tables`.
        scalars: see `_kernel`.
        lr, weight_decay, momentum, betas, eps: of this step.
        frozen: a bit per part.
    """
    tiles, kinds, scales = looked_up
    master, first, second, ema = vectors
    _kernel[(len(tiles),)](
        master, gradient, first, second, ema, *copies, tiles, kinds, scales, scalars, lr, weight_decay,
        *betas, 1 - betas[0], 1 - betas[1], eps, 1 - momentum, frozen,
        STUDENT=copies[0] is not None, TEACHER=copies[1] is not None, BLOCK=BLOCK,
    )  # fmt: skip
