"""Cross-entropy against factored targets: one read of all logits forward, one read and one write backward.

ROWS neighbouring student rows make one program. Local crops of an image are neighbours and meet the same targets, so
the program looks whether its rows agree on them and then takes each target logit's exponential once for all of them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.reduce import LN2, LOG2E, LOWEST, contiguous_rows

BLOCK_K = 512
SPLIT_K = 8192
STAGES = 2


def rows_per_program(student_rows: int, target_rows: int) -> int:
    """4 where several student rows meet each target row, else 1."""
    return 4 if student_rows >= 2 * target_rows else 1


@triton.jit
def _target(logits, stride, row, index, bias, ks, inside, scale, log2e):
    """Probabilities of the target rows `index` [I] at the prototypes `ks`: [I, len(ks)], 0 outside."""
    pointers = logits + index.to(tl.int64)[:, None] * stride + ks[None, :]
    x = tl.load(pointers, mask=inside[None, :], other=-float("inf")).to(tl.float32) * scale
    return tl.exp2(x + (tl.load(row + index) * log2e)[:, None] + bias[None, :])


@triton.jit
def _targets(logits, stride, row, col, rows, ks, K, scale, log2e, P: tl.constexpr, HAS_COL: tl.constexpr):
    """Sum over P of the target rows at `rows` [I] pointers to their first index: [I, len(ks)]."""
    inside = ks < K
    bias = tl.zeros_like(ks).to(tl.float32)
    if HAS_COL:
        bias = tl.load(col + ks, mask=inside, other=0.0) * log2e
    total = _target(logits, stride, row, tl.load(rows), bias, ks, inside, scale, log2e)
    for p in tl.static_range(1, P):
        total += _target(logits, stride, row, tl.load(rows + p), bias, ks, inside, scale, log2e)
    return total


@triton.jit
def _agree(rows, P: tl.constexpr):
    """Whether all pointers `rows` lead to the same P indices."""
    same = True
    for p in tl.static_range(P):
        index = tl.load(rows + p)
        same = same & (tl.min(index, 0) == tl.max(index, 0))
    return same


@triton.jit
def _scan(
    student,
    logits,
    logits_stride,
    row,
    col,
    rows,
    first,
    last,
    K,
    student_scale,
    target_scale,
    log2e,
    P: tl.constexpr,
    HAS_COL: tl.constexpr,
    ROWS: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    dot = tl.zeros([ROWS, BLOCK_K], tl.float32)
    mass = tl.zeros([TARGETS, BLOCK_K], tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (ks < K)[None, :]
        x = tl.load(student + ks[None, :], mask=inside, other=0.0).to(tl.float32) * student_scale
        target = _targets(logits, logits_stride, row, col, rows, ks, K, target_scale, log2e, P, HAS_COL)
        dot += target * x
        mass += target
        x = tl.where(inside, x, -float("inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - new_top)[:, None] + tl.exp2(x - new_top[:, None])
        top = new_top
    return top + tl.log2(tl.sum(total, 1)), tl.sum(dot, 1), tl.sum(mass, 1)


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    student,
    student_stride,
    logits,
    logits_stride,
    row,
    col,
    rows,
    partial,
    R,
    K,
    student_scale,
    target_scale,
    log2e,
    P: tl.constexpr,
    HAS_COL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    ids = first_row + tl.arange(0, ROWS)
    clamped = tl.minimum(ids, R - 1)
    mine = student + clamped.to(tl.int64)[:, None] * student_stride
    own = rows + clamped * P
    first = tl.program_id(1) * SPLIT_K
    last = tl.minimum(first + SPLIT_K, K)
    if _agree(own, P):
        shared = rows + (first_row + tl.arange(0, 1)) * P
        lse, dot, mass = _scan(
            mine, logits, logits_stride, row, col, shared, first, last, K, student_scale, target_scale, log2e,
            P, HAS_COL, ROWS, 1, BLOCK_K, STAGES,
        )  # fmt: skip
        mass = tl.broadcast_to(mass, [ROWS])
    else:
        lse, dot, mass = _scan(
            mine, logits, logits_stride, row, col, own, first, last, K, student_scale, target_scale, log2e,
            P, HAS_COL, ROWS, ROWS, BLOCK_K, STAGES,
        )  # fmt: skip
    out = partial + tl.program_id(1) * 3 * R + ids
    tl.store(out, lse, mask=ids < R)
    tl.store(out + R, dot, mask=ids < R)
    tl.store(out + 2 * R, mass, mask=ids < R)


@triton.jit(do_not_specialize=["R", "splits"])
def _merge_kernel(partial, loss, lse, mass, R, splits, ln2, BLOCK: tl.constexpr):
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < R
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    dots = tl.zeros([BLOCK], tl.float32)
    masses = tl.zeros([BLOCK], tl.float32)
    at = partial + ids
    for _ in range(splits):
        x = tl.load(at, mask=inside, other=0.0)
        new_top = tl.maximum(top, x)
        total = total * tl.exp2(top - new_top) + tl.exp2(x - new_top)
        top = new_top
        dots += tl.load(at + R, mask=inside, other=0.0)
        masses += tl.load(at + 2 * R, mask=inside, other=0.0)
        at += 3 * R
    top += tl.log2(total)
    tl.store(lse + ids, top, mask=inside)
    tl.store(mass + ids, masses, mask=inside)
    tl.store(loss + ids, (masses * top - dots) * ln2, mask=inside)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(
    grad_loss,
    student,
    student_stride,
    logits,
    logits_stride,
    row,
    col,
    rows,
    lse,
    mass,
    grad,
    grad_stride,
    R,
    K,
    student_scale,
    target_scale,
    log2e,
    ln2,
    P: tl.constexpr,
    HAS_COL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    ids = first_row + tl.arange(0, ROWS)
    clamped = tl.minimum(ids, R - 1)
    far = clamped.to(tl.int64)[:, None]
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (ks < K)[None, :]
    x = tl.load(student + far * student_stride + ks[None, :], mask=inside, other=0.0).to(tl.float32)
    own = rows + clamped * P
    if _agree(own, P):
        shared = rows + (first_row + tl.arange(0, 1)) * P
        target = _targets(logits, logits_stride, row, col, shared, ks, K, target_scale, log2e, P, HAS_COL)
        target = tl.broadcast_to(target, [ROWS, BLOCK_K])
    else:
        target = _targets(logits, logits_stride, row, col, own, ks, K, target_scale, log2e, P, HAS_COL)
    softmax = tl.exp2(x * student_scale - tl.load(lse + clamped)[:, None])
    scale = tl.load(grad_loss + clamped) * (student_scale * ln2)
    result = scale[:, None] * (tl.load(mass + clamped)[:, None] * softmax - target)
    mask = inside & (ids < R)[:, None]
    tl.store(grad + far * grad_stride + ks[None, :], result.to(grad.dtype.element_ty), mask=mask)


@torch.library.custom_op("poa_kernels::cross_entropy", mutates_args=())
def cross_entropy(
    student: Tensor,
    logits: Tensor,
    row: Tensor,
    col: Tensor | None,
    rows: Tensor,
    student_temperature: float,
    temperature: float,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, base-2 log-sum-exp of the student's logits and mass of the targets, each `[R]` fp32."""
    r, k = student.shape
    loss, lse, mass = (student.new_empty(r, dtype=torch.float32) for _ in range(3))
    if r == 0:
        return loss, lse, mass
    student, logits = contiguous_rows(student), contiguous_rows(logits)
    splits = triton.cdiv(k, SPLIT_K)
    partial = student.new_empty(splits, 3, r, dtype=torch.float32)
    tile = rows_per_program(r, logits.shape[0])
    _forward_kernel[(triton.cdiv(r, tile), splits)](
        student,
        student.stride(0),
        logits,
        logits.stride(0),
        row,
        col,
        rows,
        partial,
        r,
        k,
        LOG2E / student_temperature,
        LOG2E / temperature,
        LOG2E,
        P=rows.shape[1],
        HAS_COL=col is not None,
        ROWS=tile,
        BLOCK_K=BLOCK_K,
        SPLIT_K=SPLIT_K,
        STAGES=STAGES,
    )
    block = 128
    _merge_kernel[(triton.cdiv(r, block),)](partial, loss, lse, mass, r, splits, LN2, BLOCK=block)
    return loss, lse, mass


@cross_entropy.register_fake
def _(
    student: Tensor,
    logits: Tensor,
    row: Tensor,
    col: Tensor | None,
    rows: Tensor,
    student_temperature: float,
    temperature: float,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse, mass = (student.new_empty(student.shape[0], dtype=torch.float32) for _ in range(3))
    return loss, lse, mass


@torch.library.custom_op("poa_kernels::cross_entropy_backward", mutates_args=("grad",))
def cross_entropy_backward(
    grad: Tensor,
    grad_loss: Tensor,
    student: Tensor,
    logits: Tensor,
    row: Tensor,
    col: Tensor | None,
    rows: Tensor,
    lse: Tensor,
    mass: Tensor,
    student_temperature: float,
    temperature: float,
) -> None:
    """Writes the gradient with respect to the student's logits into `grad` `[R, K]`, which may be `student` itself."""
    r, k = student.shape
    if r == 0:
        return
    student, logits = contiguous_rows(student), contiguous_rows(logits)
    tile = rows_per_program(r, logits.shape[0])
    _backward_kernel[(triton.cdiv(r, tile), triton.cdiv(k, BLOCK_K))](
        grad_loss.contiguous(),
        student,
        student.stride(0),
        logits,
        logits.stride(0),
        row,
        col,
        rows,
        lse,
        mass,
        grad,
        grad.stride(0),
        r,
        k,
        LOG2E / student_temperature,
        LOG2E / temperature,
        LOG2E,
        LN2,
        P=rows.shape[1],
        HAS_COL=col is not None,
        ROWS=tile,
        BLOCK_K=BLOCK_K,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.student_temperature, ctx.temperature, ctx.inplace = inputs
    _, lse, mass = output
    ctx.mark_non_differentiable(lse, mass)
    ctx.save_for_backward(*tensors, lse, mass)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    student, *others = ctx.saved_tensors
    if ctx.inplace and student.stride(-1) == 1:
        grad = student.detach()
    else:
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    cross_entropy_backward(grad, grad_loss, student, *others, ctx.student_temperature, ctx.temperature)
    return grad, None, None, None, None, None, None, None


cross_entropy.register_autograd(_backward, setup_context=_setup_context)
