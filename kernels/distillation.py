"""Factored teacher distributions and the cross-entropy against them.

A target distribution is p[m, k] = exp(logits[m, k] / T + row[m] + col[k]); it is never written out. Softmax centering
has col = -center / T and row = -logsumexp, Sinkhorn-Knopp has the logarithms of its scalings, a plain softmax no `col`.

Letters: R student rows, M target rows, K prototypes, P target rows that one student row meets.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import use_triton

# Logits handled at once: on the CPU what stays in its cache, on a GPU what bounds the memory.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 28}


class Targets(NamedTuple):
    """Distributions p = exp(logits / temperature + row[:, None] + col) over K prototypes.

    Attributes:
        logits: `[M, K]`, any floating dtype.
        row: `[M]` fp32.
        col: `[K]` fp32, or None for zeros.
        temperature: the teacher's temperature.
    """

    logits: Tensor
    row: Tensor
    col: Tensor | None
    temperature: float


def cross_entropy(
    student: Tensor,
    targets: Targets,
    rows: Tensor,
    student_temperature: float,
    *,
    impl: str,
    inplace_backward: bool = False,
) -> Tensor:
    """Cross-entropy of every student row against its target rows, summed over these.

        loss[r] = - sum_p sum_k target[rows[r, p], k] * log softmax(student[r] / student_temperature)[k]

    Differentiable in `student` alone. Arithmetic is in fp32, the gradient has the dtype of `student`.

    Args:
        student: `[R, K]` logits, fp32, bf16 or fp16.
        targets: M target rows over the same K prototypes.
        rows: `[R, P]` int32 or int64, the target rows of each student row.
        student_temperature: divisor of the student's logits.
        impl: "eager" or "triton".
        inplace_backward: the backward pass of "triton" may write the gradient over `student`, whose values nobody reads
            after the loss. ("eager" always keeps the gradient instead of the logits, and may scale it where it lies.)
            A second backward pass is refused then.

    Returns:
        `[R]` fp32.

    Raises:
        ValueError: shapes do not fit, or `impl` is unknown or cannot run here.
    """
    triton = use_triton(impl, student)
    _check(student, targets, rows)
    if triton:
        from kernels.fused.distillation import cross_entropy as fused

        row, col = targets.row.float().contiguous(), targets.col
        col = None if col is None else col.float().contiguous()
        loss, _, _ = fused(
            student,
            targets.logits,
            row,
            col,
            rows.contiguous(),
            student_temperature,
            targets.temperature,
            inplace_backward,
        )
        return loss
    return _CrossEntropy.apply(student, targets, rows, student_temperature, inplace_backward)


@torch.no_grad()
def row_logsumexp(logits: Tensor, temperature: float, col: Tensor | None = None, *, impl: str) -> Tensor:
    """logsumexp over the prototypes of logits / temperature + col.

    Args:
        logits: `[M, K]`, any floating dtype.
        temperature: divisor of the logits.
        col: `[K]` fp32, or None for zeros.
        impl: "eager" or "triton".

    Returns:
        `[M]` fp32, without gradient.
    """
    if use_triton(impl, logits):
        from kernels.fused.reduce import row_logsumexp as fused

        return fused(logits, temperature, col)
    out = logits.new_empty(logits.shape[0], dtype=torch.float32)
    for part in _chunks(logits):
        out[part] = _scaled(logits[part], temperature, col).logsumexp(-1)
    return out


@torch.no_grad()
def column_sum(logits: Tensor, *, impl: str) -> Tensor:
    """Sum over the rows of `[M, K]` logits, for the center's moving average: `[K]` fp32, without gradient."""
    if use_triton(impl, logits):
        from kernels.fused.reduce import column_sum as fused

        return fused(logits)
    return logits.sum(0, dtype=torch.float32)


class _CrossEntropy(torch.autograd.Function):
    """The loss row by row; the forward pass keeps d loss / d student instead of the student's logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, targets: Targets, rows: Tensor, temperature: float, inplace: bool) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        loss = student.new_empty(student.shape[0], dtype=dtype)
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        for part in _chunks(student):
            target = _probabilities(targets, rows[part]).to(dtype)[:, None]  # [groups, 1, K]
            mass = target.sum(-1, keepdim=True)
            x = student[part].to(dtype).view(len(target), -1, student.shape[1])  # [groups, rows, K]
            top = x.amax(-1, keepdim=True)
            # the gradient's own memory serves as scratch where its dtype allows
            shifted = torch.sub(x, top, out=gradient[part].view(x.shape) if student.dtype == dtype else None)
            dot = (target * shifted).sum(-1) / temperature
            exponential = shifted.div_(temperature).exp_()
            total = exponential.sum(-1, keepdim=True)
            loss[part] = ((mass * total.log()).squeeze(-1) - dot).flatten()
            exponential.mul_(mass / total / temperature).sub_(target, alpha=1 / temperature)
            if student.dtype != dtype:
                gradient[part] = exponential.view(-1, student.shape[1])
        ctx.save_for_backward(gradient)
        ctx.inplace = inplace
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scale = grad_loss[:, None]
        scaled = gradient.mul_(scale) if ctx.inplace else (gradient * scale).to(gradient.dtype)
        return scaled, None, None, None, None


def _probabilities(targets: Targets, rows: Tensor) -> Tensor:
    """`[groups, K]` sums of the target rows `rows` `[R, P]`.

    Neighbours that meet the same targets make a group if all groups are equally large; else every row is its own.
    """
    unique, counts = torch.unique_consecutive(rows, dim=0, return_counts=True)
    if (counts != counts[0]).any():
        unique = rows
    total: Tensor | None = None
    for index in unique.unbind(1):
        logits = targets.logits.index_select(0, index)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probability = torch.add(targets.row[index, None], wide, alpha=1 / targets.temperature)
        if targets.col is not None:
            probability.add_(targets.col)
        probability.exp_()
        total = probability if total is None else total.add_(probability)
    assert total is not None
    return total


def _scaled(logits: Tensor, temperature: float, col: Tensor | None) -> Tensor:
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return scaled if col is None else scaled.add_(col)


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows, columns = logits.shape
    size = max(1, _CHUNK[logits.device.type] // max(columns, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _check(student: Tensor, targets: Targets, rows: Tensor) -> None:
    k = student.shape[-1]
    if student.ndim != 2 or targets.logits.ndim != 2 or targets.logits.shape[1] != k:
        raise ValueError(
            f"student and target logits: expected [R, K] and [M, K], got {list(student.shape)} and "
            f"{list(targets.logits.shape)}"
        )
    if rows.ndim != 2 or rows.shape[0] != student.shape[0] or rows.shape[1] == 0:
        raise ValueError(f"rows: expected [{student.shape[0]}, P] with P > 0, got {list(rows.shape)}")
    if rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows: expected int32 or int64, got {rows.dtype}")
    if targets.row.shape != targets.logits.shape[:1]:
        raise ValueError(f"targets.row: expected [{targets.logits.shape[0]}], got {list(targets.row.shape)}")
    if targets.col is not None and targets.col.shape != (k,):
        raise ValueError(f"targets.col: expected [{k}], got {list(targets.col.shape)}")
