"""x + factor * gamma * branch on some rows of x, in one pass forward and one backward.

The forward pass goes over the rows of x and looks up which row of the branch belongs to each, so that every row is read
and written once; the backward pass goes over the rows of the branch. The gradient of gamma is summed by each program
for its rows and then over programs, in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4
MAX_BLOCK_C = 512
PROGRAMS = 1024  # of the backward pass, about: enough to fill a device, few enough partial sums


def _block(channels: int) -> int:
    return min(MAX_BLOCK_C, triton.next_power_of_2(channels))


def _rows_per_program(rows: int, column_blocks: int) -> int:
    return triton.cdiv(triton.cdiv(rows, max(1, PROGRAMS // column_blocks)), ROWS) * ROWS


@triton.jit(do_not_specialize=["T"])
def _add_kernel(
    x,
    branch,
    positions,
    gamma,
    factors,
    out,
    T,
    C,
    factor,
    HAS_GAMMA: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ids = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (ids < T)[:, None] & (cs < C)[None, :]
    position = tl.load(positions + ids, mask=ids < T, other=-1)
    kept = position >= 0
    source = branch + position.to(tl.int64)[:, None] * C + cs[None, :]
    added = tl.load(source, mask=inside & kept[:, None], other=0.0).to(tl.float32)
    if HAS_GAMMA:
        added *= tl.load(gamma + cs, mask=cs < C, other=0.0).to(tl.float32)[None, :]
    if HAS_FACTORS:
        added *= tl.load(factors + position, mask=kept, other=0.0)[:, None]
    else:
        added *= factor
    at = ids.to(tl.int64)[:, None] * C + cs[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + added
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def _add_backward_kernel(
    grad,
    branch,
    rows,
    gamma,
    factors,
    grad_branch,
    partial,
    R,
    C,
    factor,
    split,
    HAS_GAMMA: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(0) * split
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    if HAS_GAMMA:
        scale = tl.load(gamma + cs, mask=cs < C, other=0.0).to(tl.float32)[None, :]
    for start in range(first, tl.minimum(first + split, R), ROWS):
        ids = start + tl.arange(0, ROWS)
        inside = (ids < R)[:, None] & (cs < C)[None, :]
        row = tl.load(rows + ids, mask=ids < R, other=0)
        g = tl.load(grad + row[:, None] * C + cs[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            g *= tl.load(factors + ids, mask=ids < R, other=0.0)[:, None]
        else:
            g *= factor
        at = ids.to(tl.int64)[:, None] * C + cs[None, :]
        if HAS_GAMMA:
            total += g * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            g *= scale
        tl.store(grad_branch + at, g.to(grad_branch.dtype.element_ty), mask=inside)
    if HAS_GAMMA:
        tl.store(partial + tl.program_id(0).to(tl.int64) * C + cs, tl.sum(total, 0), mask=cs < C)


@torch.library.custom_op("poa_kernels::add_rows", mutates_args=())
def add_rows(
    x: Tensor,
    branch: Tensor,
    rows: Tensor,
    positions: Tensor,
    gamma: Tensor | None,
    factors: Tensor | None,
    factor: float,
) -> Tensor:
    """`[T, C]`; `factors` are fp32 `[R, 1]` per row, `factor` is that of all rows if they are None."""
    t, c = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    block = _block(c)
    _add_kernel[(triton.cdiv(t, ROWS), triton.cdiv(c, block))](
        x.contiguous(),
        branch.contiguous(),
        positions,
        gamma,
        factors,
        out,
        t,
        c,
        factor,
        HAS_GAMMA=gamma is not None,
        HAS_FACTORS=factors is not None,
        ROWS=ROWS,
        BLOCK_C=block,
    )
    return out


@add_rows.register_fake
def _(
    x: Tensor,
    branch: Tensor,
    rows: Tensor,
    positions: Tensor,
    gamma: Tensor | None,
    factors: Tensor | None,
    factor: float,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("poa_kernels::add_rows_backward", mutates_args=())
def add_rows_backward(
    grad: Tensor, branch: Tensor, rows: Tensor, gamma: Tensor | None, factors: Tensor | None, factor: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the branch `[R, C]` and, summed in fp32, of gamma: `[C]`, or `[0]` without gamma."""
    r, c = branch.shape
    grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    channels = 0 if gamma is None else c
    if branch.numel() == 0:
        return grad_branch, branch.new_zeros(channels, dtype=torch.float32)
    block = _block(c)
    column_blocks = triton.cdiv(c, block)
    split = _rows_per_program(r, column_blocks)
    partial = branch.new_empty(triton.cdiv(r, split), channels, dtype=torch.float32)
    _add_backward_kernel[(triton.cdiv(r, split), column_blocks)](
        grad.contiguous(),
        branch.contiguous(),
        rows,
        gamma,
        factors,
        grad_branch,
        partial,
        r,
        c,
        factor,
        split,
        HAS_GAMMA=gamma is not None,
        HAS_FACTORS=factors is not None,
        ROWS=ROWS,
        BLOCK_C=block,
    )
    return grad_branch, partial.sum(0)


@add_rows_backward.register_fake
def _(
    grad: Tensor, branch: Tensor, rows: Tensor, gamma: Tensor | None, factors: Tensor | None, factor: float
) -> tuple[Tensor, Tensor]:
    grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    return grad_branch, branch.new_empty(0 if gamma is None else branch.shape[1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, rows, _, gamma, factors, ctx.factor = inputs
    ctx.save_for_backward(branch, rows, gamma, factors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    branch, rows, gamma, factors = ctx.saved_tensors
    grad_branch, grad_gamma = add_rows_backward(grad, branch, rows, gamma, factors, ctx.factor)
    return grad, grad_branch, None, None, None if gamma is None else grad_gamma.to(gamma.dtype), None, None


add_rows.register_autograd(_backward, setup_context=_setup_context)
