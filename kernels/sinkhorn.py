"""Sinkhorn-Knopp as scalings of rows and columns, over all ranks and all heads at once.

With E = exp(logits / T) `[B, K]` (B rows over all ranks, K prototypes) it alternates

    u[k] = 1 / (K * sum_b E[b, k] v[b])        v[b] = 1 / (B * sum_k E[b, k] u[k])

from v = 1 / B, and the targets are B * v[b] * E[b, k] * u[k]: rows sum to one, columns to about B / K. Only the vectors
are kept, as logarithms: one read of the logits makes each half of an iteration.
Source: Cuturi 2013, as used by SwAV and DINOv2.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import use_triton
from kernels.distillation import row_logsumexp

_CHUNK = 1 << 18


@torch.no_grad()
def sinkhorn(
    logits: Sequence[Tensor],
    temperature: float,
    iterations: int = 3,
    *,
    group: dist.ProcessGroup | None = None,
    impl: str,
) -> list[tuple[Tensor, Tensor]]:
    """Log scalings that turn each entry's logits into balanced targets exp(logits / temperature + row + col).

    The entries (heads, cls or patch tokens) are independent problems; one all-reduce per iteration carries the column
    sums of all of them and their row counts. A rank may hold no rows of an entry.
    Safe for |logits / temperature| up to 80.

    Args:
        logits: entries `[M_i, K_i]` of this rank, any floating dtype, all on one device.
        temperature: the teacher's temperature.
        iterations: at least 1.
        group: the ranks that share the problem, None for all (or this process alone without torch.distributed).
        impl: "eager" or "triton".

    Returns:
        For every entry `row` `[M_i]` = log(B v) and `col` `[K_i]` = log u, fp32.

    Raises:
        ValueError: `logits` is empty, `iterations` < 1, or `impl` is unknown or cannot run here.
    """
    if not logits or iterations < 1:
        raise ValueError(f"expected at least one entry and one iteration, got {len(logits)} and {iterations}")
    use_triton(impl, logits[0])
    rows = [entry.new_zeros(entry.shape[0], dtype=torch.float32) for entry in logits]  # v = 1 / B
    cols: list[Tensor] = []
    for _ in range(iterations):
        local = [column_logsumexp(entry, temperature, row, impl=impl) for entry, row in zip(logits, rows, strict=True)]
        cols = _column_scalings(local, [len(row) for row in rows], group)
        rows = [
            row_logsumexp(entry, temperature, col, impl=impl).neg_() for entry, col in zip(logits, cols, strict=True)
        ]
    return list(zip(rows, cols, strict=True))


@torch.no_grad()
def column_logsumexp(logits: Tensor, temperature: float, row: Tensor, *, impl: str) -> Tensor:
    """logsumexp over the rows of logits `[M, K]` / temperature + row `[M]`: `[K]` fp32, -inf without rows."""
    if use_triton(impl, logits):
        from kernels.fused.reduce import column_logsumexp as fused

        return fused(logits, temperature, row)
    out = logits.new_empty(logits.shape[1], dtype=torch.float32)
    size = max(64, _CHUNK // max(logits.shape[0], 1))
    for start in range(0, logits.shape[1], size):
        part = slice(start, start + size)
        out[part] = (logits[:, part].float() / temperature).add_(row[:, None]).logsumexp(0)
    return out


def _column_scalings(local: list[Tensor], counts: list[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """log u of every entry from the ranks' column logsumexp, in one all-reduce of fp64 sums (room for exp(+-700))."""
    sizes = [len(part) for part in local]
    device = local[0].device
    packed = torch.cat([*local, torch.tensor(counts, dtype=torch.float32).log().to(device)]).double().exp_()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(packed, group=group)
    # an entry without rows on any rank has sums of zero: any finite scaling will do
    *logs, log_counts = packed.clamp_min_(torch.finfo(torch.float64).tiny).log_().split([*sizes, len(sizes)])
    return [
        (log_count - math.log(size) - log_sum).float()
        for log_count, size, log_sum in zip(log_counts, sizes, logs, strict=True)
    ]
