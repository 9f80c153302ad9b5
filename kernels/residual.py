"""Adding a residual branch that was computed for some rows only."""

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
