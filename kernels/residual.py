"""A residual branch that is computed for some rows only: taking them, and adding the result."""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import use_triton


def row_positions(rows: Tensor, total: int) -> Tensor:
    """The inverse of row indices.

    Args:
        rows: int64 `[..., R]`, no index twice.
        total: rows T that they point into.

    Returns:
        int32 `[..., T]`: the place within `rows`, -1 for a row that is not there.
    """
    positions = torch.full((*rows.shape[:-1], total), -1, dtype=torch.int32, device=rows.device)
    places = torch.arange(rows.shape[-1], dtype=torch.int32, device=rows.device)
    return positions.scatter_(-1, rows, places.expand(rows.shape))


def take_rows(x: Tensor, rows: Tensor, positions: Tensor, *, impl: str) -> tuple[Tensor, Tensor]:
    """Rows of x for a branch, and x for what passes it by.

    One `add_rows` adds both gradients up. Autograd would put those of the rows into a matrix of zeros, and add that to
    the other: three passes.

    Args:
        x: `[T, C]`.
        rows: int64 `[R]`, no index twice.
        positions: int32 `[T]`, `row_positions(rows, T)`.
        impl: "eager" or "triton", of the backward pass.

    Returns:
        x itself and its rows `[R, C]`.
    """
    return _TakeRows.apply(x, rows, positions, impl)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, positions: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, positions)
        ctx.impl = impl
        return x.view_as(x), x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, whole: Tensor, taken: Tensor) -> tuple[Tensor, None, None, None]:
        rows, positions = ctx.saved_tensors
        return add_rows(whole, taken, rows, positions, 1.0, impl=ctx.impl), None, None, None


def add_rows(
    x: Tensor,
    branch: Tensor,
    rows: Tensor,
    positions: Tensor,
    factor: float | Tensor,
    gamma: Tensor | None = None,
    *,
    impl: str,
) -> Tensor:
    """x with factor * gamma * branch added to some of its rows: LayerScale, residual and stochastic depth at once.

    Args:
        x: `[T, C]`.
        branch: `[R, C]` in the dtype of `x`.
        rows: int64 `[R]`, the row of `x` to which each row of `branch` is added; no index twice.
        positions: int32 `[T]`, `row_positions(rows, T)`.
        factor: of all rows, or fp32 `[R, 1]`; without gradient.
        gamma: `[C]`, LayerScale's factors of the channels (arXiv 2103.17239).
        impl: "eager" or "triton".

    Returns:
        `[T, C]` in the dtype of `x`.

    Raises:
        ValueError: shapes do not fit together, or `impl` is unknown or cannot run here.
    """
    expected = {
        "branch": (branch, (len(rows), x.shape[-1])),
        "positions": (positions, (len(x),)),
        "factor": (factor, (len(rows), 1)),
        "gamma": (gamma, (x.shape[-1],)),
    }
    for name, (value, shape) in expected.items():
        if isinstance(value, Tensor) and value.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(value.shape)}")
    if use_triton(impl, x):
        from kernels.fused.residual import add_rows as fused

        per_row = factor if isinstance(factor, Tensor) else None
        return fused(x, branch, rows, positions, gamma, per_row, 1.0 if per_row is not None else factor)
    if gamma is not None:
        branch = branch * gamma
    if isinstance(factor, Tensor):
        return x.index_add(0, rows, branch * factor.to(branch.dtype))
    return x.index_add(0, rows, branch, alpha=factor)
