"""Sinkhorn-Knopp as scalings of rows and columns, over all ranks and all heads at once.

With E = exp(logits / T) `[B, K]` (B rows over all ranks, K prototypes) it alternates

    u[k] = 1 / (K * sum_b E[b, k] v[b])        v[b] = 1 / (B * sum_k E[b, k] u[k])

from v = 1 / B, and the targets are B * v[b] * E[b, k] * u[k]: rows sum to one, columns to about B / K. Only the
logarithms of u and v come out; the Triton kernels write nothing of size B x K.
Source: Cuturi 2013, as used by SwAV and DINOv2.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import use_triton

# Logits handled at once: on the CPU what stays in its cache, on a GPU what bounds the memory.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}


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
    kind = _Fused if use_triton(impl, logits[0]) else _Exponentials
    problems = [kind(entry, temperature) for entry in logits]
    # filled on the device: a copy from the host would wait for all that is queued there
    counts = torch.cat([entry.new_full((1,), len(entry), dtype=torch.float64) for entry in logits])
    rows = [entry.new_zeros(len(entry), dtype=torch.float32) for entry in logits]  # v = 1 / B
    cols: list[Tensor] = []
    for _ in range(iterations):
        sums = [problem.column_sums(row) for problem, row in zip(problems, rows, strict=True)]
        cols = _column_scalings(sums, counts, group)
        rows = [problem.row_scaling(col) for problem, col in zip(problems, cols, strict=True)]
    return list(zip(rows, cols, strict=True))


class _Fused:
    """An entry's half iterations by Triton kernels: each reads the logits once and writes vectors only."""

    def __init__(self, logits: Tensor, temperature: float) -> None:
        from kernels.fused import reduce

        self.logits, self.temperature, self.reduce = logits, temperature, reduce

    def column_sums(self, row: Tensor) -> Tensor:
        """Sum over this rank's rows of exp(logits / T + row): `[K]` fp64, which has room for exp(+-700)."""
        return self.reduce.column_logsumexp(self.logits, self.temperature, row).double().exp_()

    def row_scaling(self, col: Tensor) -> Tensor:
        """-logsumexp over the prototypes of logits / T + col: `[M]` fp32."""
        return -self.reduce.row_logsumexp(self.logits, self.temperature, col)


class _Exponentials:
    """The same in plain PyTorch, which pays for an exponential more than for memory: they are taken once.

    They are stored around the middle of each row, where logits / T within +-80 neither overflow fp32 nor vanish. Within
    +-30 any two scalings differ by less than exp(60) and fp32 holds all products; beyond, they are fp64, in which they
    are taken beyond +-80 (cosines stay within 1 / T, but prototypes may have learned a length).
    """

    def __init__(self, logits: Tensor, temperature: float) -> None:
        self.values, self.centre, widest = self._take(logits, temperature, torch.float32)
        if widest > 80:
            self.values, self.centre, _ = self._take(logits, temperature, torch.float64)
        elif widest > 30:
            self.values = self.values.double()

    @staticmethod
    def _take(logits: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """exp(logits / T - centre) `[M, K]`, the centre of each row `[M]` and the largest distance from it."""
        values = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        centres = logits.new_empty(len(logits), dtype=torch.float64)
        size = max(1, _CHUNK[logits.device.type] // logits.shape[1])
        widest = 0.0
        for part in (slice(start, start + size) for start in range(0, len(logits), size)):
            scaled = logits[part].to(dtype) / temperature
            high, low = scaled.amax(1), scaled.amin(1)
            centres[part] = centre = (high + low) / 2
            values[part] = scaled.sub_(centre[:, None]).exp_()
            widest = max(widest, float((high - low).max()) / 2)
        return values, centres, widest

    def column_sums(self, row: Tensor) -> Tensor:
        if not len(row):
            return self.centre.new_zeros(self.values.shape[1])
        log_v = row + self.centre
        top = log_v.max()
        return ((log_v - top).exp_().to(self.values.dtype) @ self.values).double() * top.exp()

    def row_scaling(self, col: Tensor) -> Tensor:
        log_u = col.double()
        top = log_u.max()
        sums = self.values @ (log_u - top).exp_().to(self.values.dtype)
        return -(sums.double().log_() + (top + self.centre)).float()


def _column_scalings(sums: list[Tensor], counts: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """log u of every entry from the ranks' column sums and row counts, in one all-reduce."""
    sizes = [len(part) for part in sums]
    packed = torch.cat([*sums, counts])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(packed, group=group)
    # an entry without rows on any rank has sums of zero: any finite scaling will do
    *logs, log_counts = packed.clamp_min_(torch.finfo(torch.float64).tiny).log_().split([*sizes, len(sizes)])
    return [
        (log_count - math.log(size) - log_sum).float()
        for log_count, size, log_sum in zip(log_counts, sizes, logs, strict=True)
    ]
