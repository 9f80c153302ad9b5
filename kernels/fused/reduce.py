"""Log-sum-exp along rows and columns of logits, and column sums, each in one read.

Long rows and tall columns are cut into splits, one program each; a small second kernel merges their partial results, so
that a few rows fill the device as well as many and the result does not depend on the order of execution.

Exponents are in base 2: the scale of the logits carries log2(e).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = math.log(2)
LOWEST = tl.constexpr(-1e30)  # the first running maximum: finite, so that -inf never meets -inf

ROWS = 4  # rows per program: they share one read of `col`
BLOCK_K = 512
SPLIT_K = 8192
COLUMN_ROWS = 4
COLUMN_BLOCK = 1024  # 4 warps hold whole columns, so the reduction over rows stays inside a thread
STAGES = 2


def rows_per_split(rows: int, columns: int) -> int:
    """Rows that one program of a column reduction reads: a multiple of 16 that leaves about 1000 programs."""
    splits = max(1, 1000 // triton.cdiv(columns, COLUMN_BLOCK))
    return max(16, triton.cdiv(triton.cdiv(rows, splits), 16) * 16)


def contiguous_rows(logits: Tensor) -> Tensor:
    """`logits` itself if neighbouring columns are neighbours in memory, else a copy."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


@triton.jit(do_not_specialize=["M"])
def _row_kernel(
    logits,
    stride,
    col,
    partial,
    M,
    K,
    scale,
    log2e,
    HAS_COL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    ids = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base = logits + tl.minimum(ids, M - 1).to(tl.int64)[:, None] * stride
    first = tl.program_id(1) * SPLIT_K
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in tl.range(first, tl.minimum(first + SPLIT_K, K), BLOCK_K, num_stages=STAGES):
        ks = start + tl.arange(0, BLOCK_K)
        x = tl.load(base + ks[None, :], mask=(ks < K)[None, :], other=-float("inf")).to(tl.float32) * scale
        if HAS_COL:
            x += tl.load(col + ks, mask=ks < K, other=0.0)[None, :] * log2e
        new_top = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - new_top)[:, None] + tl.exp2(x - new_top[:, None])
        top = new_top
    tl.store(partial + tl.program_id(1) * M + ids, top + tl.log2(tl.sum(total, 1)), mask=ids < M)


@triton.jit(do_not_specialize=["M"])
def _column_kernel(
    logits,
    stride,
    row,
    partial,
    M,
    K,
    scale,
    log2e,
    split,
    EXPONENTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    ks = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * split
    top = tl.full([BLOCK_K], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.range(first, tl.minimum(first + split, M), ROWS, num_stages=STAGES):
        ids = start + tl.arange(0, ROWS)
        inside = (ids < M)[:, None] & (ks < K)[None, :]
        x = tl.load(logits + ids.to(tl.int64)[:, None] * stride + ks[None, :], mask=inside, other=0.0).to(tl.float32)
        if EXPONENTIAL:
            x = x * scale + tl.load(row + ids, mask=ids < M, other=0.0)[:, None] * log2e
            x = tl.where(inside, x, -float("inf"))
            new_top = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top[None, :]), 0)
            top = new_top
        else:
            total += tl.sum(x, 0)
    if EXPONENTIAL:
        total = top + tl.log2(total)
    tl.store(partial + tl.program_id(1).to(tl.int64) * K + ks, total, mask=ks < K)


@triton.jit(do_not_specialize=["N", "splits"])
def _merge_kernel(partial, out, N, splits, ln2, EXPONENTIAL: tl.constexpr, BLOCK: tl.constexpr):
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    at = partial + ids
    for _ in range(splits):
        x = tl.load(at, mask=ids < N, other=0.0)
        at += N
        if EXPONENTIAL:
            new_top = tl.maximum(top, x)
            total = total * tl.exp2(top - new_top) + tl.exp2(x - new_top)
            top = new_top
        else:
            total += x
    if EXPONENTIAL:
        total = (top + tl.log2(total)) * ln2
    tl.store(out + ids, total, mask=ids < N)


def _merge(partial: Tensor, exponential: bool) -> Tensor:
    """Partial results `[splits, N]` of the kernels above, to `[N]` (natural logarithms)."""
    splits, n = partial.shape
    out = partial.new_empty(n)
    block = 256
    _merge_kernel[(triton.cdiv(n, block),)](partial, out, n, splits, LN2, EXPONENTIAL=exponential, BLOCK=block)
    return out


@torch.library.custom_op("poa_kernels::row_logsumexp", mutates_args=())
def row_logsumexp(logits: Tensor, temperature: float, col: Tensor | None) -> Tensor:
    """logsumexp of logits `[M, K]` / temperature + col over K: `[M]` fp32."""
    m, k = logits.shape
    if m == 0:
        return logits.new_empty(0, dtype=torch.float32)
    logits = contiguous_rows(logits)
    splits = triton.cdiv(k, SPLIT_K)
    partial = logits.new_empty(splits, m, dtype=torch.float32)
    _row_kernel[(triton.cdiv(m, ROWS), splits)](
        logits,
        logits.stride(0),
        None if col is None else col.float().contiguous(),
        partial,
        m,
        k,
        LOG2E / temperature,
        LOG2E,
        HAS_COL=col is not None,
        ROWS=ROWS,
        BLOCK_K=BLOCK_K,
        SPLIT_K=SPLIT_K,
        STAGES=STAGES,
    )
    return _merge(partial, exponential=True)


@row_logsumexp.register_fake
def _(logits: Tensor, temperature: float, col: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("poa_kernels::column_logsumexp", mutates_args=())
def column_logsumexp(logits: Tensor, temperature: float, row: Tensor) -> Tensor:
    """logsumexp of logits `[M, K]` / temperature + row `[M]` over M: `[K]` fp32."""
    return _columns(logits, LOG2E / temperature, row.float().contiguous())


@column_logsumexp.register_fake
def _(logits: Tensor, temperature: float, row: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[1], dtype=torch.float32)


@torch.library.custom_op("poa_kernels::column_sum", mutates_args=())
def column_sum(logits: Tensor) -> Tensor:
    """Sum of logits `[M, K]` over M: `[K]` fp32."""
    return _columns(logits, 1.0, None)


@column_sum.register_fake
def _(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[1], dtype=torch.float32)


def _columns(logits: Tensor, scale: float, row: Tensor | None) -> Tensor:
    m, k = logits.shape
    if m == 0:
        return logits.new_full((k,), 0.0 if row is None else -math.inf, dtype=torch.float32)
    logits = contiguous_rows(logits)
    split = rows_per_split(m, k)
    partial = logits.new_empty(triton.cdiv(m, split), k, dtype=torch.float32)
    _column_kernel[(triton.cdiv(k, COLUMN_BLOCK), triton.cdiv(m, split))](
        logits,
        logits.stride(0),
        row,
        partial,
        m,
        k,
        scale,
        LOG2E,
        split,
        EXPONENTIAL=row is not None,
        ROWS=COLUMN_ROWS,
        BLOCK_K=COLUMN_BLOCK,
        STAGES=STAGES,
    )
    return _merge(partial, exponential=row is not None)
