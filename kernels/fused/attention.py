"""Self-attention of short sequences, forward and backward, on the packed qkv projection without permutes or copies.

One program handles one block of one head for a few sequences after another. Sequences of up to 64 tokens fit one
block: then all three gradients come from one pass. Longer ones make two passes over the blocks, one for keys and
values, one for queries. No gradient is added up by atomics across programs: the result is the same bits every time.

Letters: B sequences, N tokens, H heads, D channels per head, W windows; i, j number blocks of tokens.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from kernels.dispatch import interpreted
from kernels.fused.reduce import LN2, LOG2E, LOWEST

HEAD_DIMS = (16, 32, 64)
PROGRAMS = 2048


def block_tokens(tokens: int, with_bias: bool, dtype: torch.dtype) -> int:
    """Tokens per block: up to 64, but smaller tiles for fp32 and for a bias gradient in several blocks."""
    limit = 32 if dtype == torch.float32 or (with_bias and tokens > 64) else 64
    return min(limit, max(16, triton.next_power_of_2(tokens)))


def sequences_per_program(batch: int, heads: int, blocks: int, with_bias: bool) -> int:
    """Sequences that one program takes in turn: enough programs to fill a GPU, few partial bias gradients."""
    return min(max(batch * heads * blocks // PROGRAMS, 1), 64 if with_bias else 8)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """Product with fp32 accumulation. The interpreter would multiply the bits of bf16: there they become fp32 first."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _rows(base, i, stride, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of block i, channels of one head: [BLOCK, D], zeros behind the last token."""
    ns = i * BLOCK + tl.arange(0, BLOCK)
    return tl.load(base + ns[:, None] * stride + tl.arange(0, D)[None, :], mask=(ns < N)[:, None], other=0.0)


@triton.jit
def _store_rows(base, i, stride, value, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    ns = i * BLOCK + tl.arange(0, BLOCK)
    at = base + ns[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=(ns < N)[:, None])


@triton.jit
def _square(i, j, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Offsets of tile (i, j) in a matrix of BLOCKS x BLOCKS tiles."""
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    return rows[:, None] * (BLOCK * BLOCKS) + columns[None, :]


@triton.jit
def _scores(
    q,
    k,
    i,
    j,
    bias,
    mask,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 logits of query block i and key block j, -inf behind the last key.

    `bias` is a tile, `mask` a pointer, both as `_padded` makes them.
    """
    scores = _dot(q, tl.trans(k), PRECISION) * scale
    if HAS_BIAS:
        scores += bias
    if HAS_MASK:
        scores += tl.load(mask + _square(i, j, BLOCK, BLOCKS))
    if N % BLOCK != 0 and not HAS_BIAS and not HAS_MASK:
        scores = tl.where((j * BLOCK + tl.arange(0, BLOCK) < N)[None, :], scores, -float("inf"))
    return scores


@triton.jit(do_not_specialize=["B", "W", "sequences"])
def _forward_kernel(
    qkv,
    stride_b,
    stride_n,
    width,
    bias,
    mask,
    out,
    lse,
    B,
    W,
    sequences,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    AREA: tl.constexpr = (BLOCK * BLOCKS) * (BLOCK * BLOCKS)
    head, i = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0) * sequences
    bias_head = bias + head * AREA if HAS_BIAS else bias
    tile = tl.zeros([BLOCK, BLOCK], tl.float32)
    if HAS_BIAS and BLOCKS == 1:
        tile = tl.load(bias_head + _square(i, i, BLOCK, BLOCKS))
    for b in range(first, tl.minimum(first + sequences, B)):
        query = qkv + tl.cast(b, tl.int64) * stride_b + head * D
        mask_window = mask + (b % W) * AREA if HAS_MASK else mask
        q = _rows(query, i, stride_n, N, D, BLOCK)
        top = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, D], tl.float32)
        for j in range(BLOCKS):
            k = _rows(query + width, j, stride_n, N, D, BLOCK)
            if HAS_BIAS and BLOCKS > 1:
                tile = tl.load(bias_head + _square(i, j, BLOCK, BLOCKS))
            s = _scores(q, k, i, j, tile, mask_window, scale, HAS_BIAS, HAS_MASK, N, BLOCK, BLOCKS, PRECISION)
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            v = _rows(query + 2 * width, j, stride_n, N, D, BLOCK)
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v, PRECISION)
            top = new_top
        ns = i * BLOCK + tl.arange(0, BLOCK)
        at = lse + (tl.cast(b, tl.int64) * tl.num_programs(1) + head) * N + ns
        tl.store(at, top + tl.log2(total), mask=ns < N)
        _store_rows(out + tl.cast(b, tl.int64) * N * width + head * D, i, width, acc / total[:, None], N, D, BLOCK)


@triton.jit
def _probabilities(
    q,
    k,
    i,
    j,
    lse,
    bias,
    mask,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax of query block i over key block j, zero behind the last token."""
    ns = i * BLOCK + tl.arange(0, BLOCK)
    norm = tl.load(lse + ns, mask=ns < N, other=float("inf"))
    s = _scores(q, k, i, j, bias, mask, scale, HAS_BIAS, HAS_MASK, N, BLOCK, BLOCKS, PRECISION)
    return tl.exp2(s - norm[:, None])


@triton.jit
def _delta(out, i, stride, grad_out, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    return tl.sum(_rows(out, i, stride, N, D, BLOCK).to(tl.float32) * grad_out.to(tl.float32), 1)


@triton.jit(do_not_specialize=["B", "W", "sequences"])
def _backward_kernel(
    grad_out,
    qkv,
    stride_b,
    stride_n,
    width,
    bias,
    mask,
    out,
    lse,
    grad_qkv,
    grad_bias,
    B,
    W,
    sequences,
    scale,
    ln2,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    AREA: tl.constexpr = (BLOCK * BLOCKS) * (BLOCK * BLOCKS)
    head, i = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0) * sequences
    bias_head = bias + head * AREA if HAS_BIAS else bias
    bias_part = grad_bias
    tile = tl.zeros([BLOCK, BLOCK], tl.float32)
    bias_acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if HAS_BIAS:
        part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
        bias_part = grad_bias + part * AREA
    for b in range(first, tl.minimum(first + sequences, B)):
        far = tl.cast(b, tl.int64)
        query = qkv + far * stride_b + head * D
        mask_window = mask + (b % W) * AREA if HAS_MASK else mask
        norm = lse + (far * tl.num_programs(1) + head) * N
        above = grad_out + far * N * width + head * D
        result = out + far * N * width + head * D
        target = grad_qkv + far * N * 3 * width + head * D

        k = _rows(query + width, i, stride_n, N, D, BLOCK)
        v = _rows(query + 2 * width, i, stride_n, N, D, BLOCK)
        grad_k = tl.zeros([BLOCK, D], tl.float32)
        grad_v = tl.zeros([BLOCK, D], tl.float32)
        for j in range(BLOCKS):
            q = _rows(query, j, stride_n, N, D, BLOCK)
            do = _rows(above, j, width, N, D, BLOCK)
            if HAS_BIAS:
                tile = tl.load(bias_head + _square(j, i, BLOCK, BLOCKS))
            p = _probabilities(
                q, k, j, i, norm, tile, mask_window, scale, HAS_BIAS, HAS_MASK, N, BLOCK, BLOCKS, PRECISION
            )
            grad_v += _dot(tl.trans(p.to(do.dtype)), do, PRECISION)
            dp = _dot(do, tl.trans(v), PRECISION)
            delta = tl.sum(p * dp, 1) if BLOCKS == 1 else _delta(result, j, width, do, N, D, BLOCK)
            ds = p * (dp - delta[:, None])
            if HAS_BIAS and BLOCKS == 1:
                bias_acc += ds
            if HAS_BIAS and BLOCKS > 1:
                # this program alone writes here
                tl.atomic_add(bias_part + _square(j, i, BLOCK, BLOCKS), ds, sem="relaxed")
            ds = ds.to(q.dtype)
            grad_k += _dot(tl.trans(ds), q, PRECISION)
            if BLOCKS == 1:
                grad_q = _dot(ds, k, PRECISION)
                _store_rows(target, i, 3 * width, grad_q * (scale * ln2), N, D, BLOCK)
        _store_rows(target + width, i, 3 * width, grad_k * (scale * ln2), N, D, BLOCK)
        _store_rows(target + 2 * width, i, 3 * width, grad_v, N, D, BLOCK)

        if BLOCKS > 1:
            q = _rows(query, i, stride_n, N, D, BLOCK)
            do = _rows(above, i, width, N, D, BLOCK)
            delta = _delta(result, i, width, do, N, D, BLOCK)
            grad_q = tl.zeros([BLOCK, D], tl.float32)
            for j in range(BLOCKS):
                k = _rows(query + width, j, stride_n, N, D, BLOCK)
                v = _rows(query + 2 * width, j, stride_n, N, D, BLOCK)
                if HAS_BIAS:
                    tile = tl.load(bias_head + _square(i, j, BLOCK, BLOCKS))
                p = _probabilities(
                    q, k, i, j, norm, tile, mask_window, scale, HAS_BIAS, HAS_MASK, N, BLOCK, BLOCKS, PRECISION
                )
                dp = _dot(do, tl.trans(v), PRECISION)
                ds = (p * (dp - delta[:, None])).to(k.dtype)
                grad_q += _dot(ds, k, PRECISION)
            _store_rows(target, i, 3 * width, grad_q * (scale * ln2), N, D, BLOCK)
    if HAS_BIAS and BLOCKS == 1:
        tl.store(bias_part + _square(i, i, BLOCK, BLOCKS), bias_acc)


@torch.library.custom_op("poa_kernels::attention", mutates_args=())
def attention(qkv: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H * D]` and base-2 log-sum-exp `[B, H, N]` fp32."""
    b, n, _, h, d = qkv.shape
    out, lse = qkv.new_empty(b, n, h * d), qkv.new_empty(b, h, n, dtype=torch.float32)
    if b == 0:
        return out, lse
    qkv = _packed(qkv)
    grid, sequences, constants = _plan(qkv, bias, mask)
    block = constants["BLOCK"]
    _forward_kernel[grid](
        qkv,
        qkv.stride(0),
        qkv.stride(1),
        h * d,
        _padded(bias, block),
        _padded(mask, block),
        out,
        lse,
        b,
        1 if mask is None else mask.shape[0],
        sequences,
        LOG2E * d**-0.5,
        **constants,
        num_warps=4,
        num_stages=2,
    )
    return out, lse


@attention.register_fake
def _(qkv: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    b, n, _, h, d = qkv.shape
    return qkv.new_empty(b, n, h * d), qkv.new_empty(b, h, n, dtype=torch.float32)


@torch.library.custom_op("poa_kernels::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor, qkv: Tensor, bias: Tensor | None, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients `[B, N, 3, H, D]` of qkv, and of the bias `[H, N, N]` in its dtype (empty without one)."""
    b, n, _, h, d = qkv.shape
    grad_qkv = qkv.new_empty(qkv.shape)
    if b == 0:
        return grad_qkv, qkv.new_zeros(0) if bias is None else torch.zeros_like(bias)
    qkv = _packed(qkv)
    grid, sequences, constants = _plan(qkv, bias, mask)
    block, blocks = constants["BLOCK"], constants["BLOCKS"]
    parts = None
    if bias is not None:
        allocate = qkv.new_empty if blocks == 1 else qkv.new_zeros
        side = block * blocks
        parts = allocate(grid[0], h, side, side, dtype=torch.float32)
    _backward_kernel[grid](
        grad_out.contiguous(),
        qkv,
        qkv.stride(0),
        qkv.stride(1),
        h * d,
        _padded(bias, block),
        _padded(mask, block),
        out,
        lse,
        grad_qkv,
        parts,
        b,
        1 if mask is None else mask.shape[0],
        sequences,
        LOG2E * d**-0.5,
        LN2,
        **constants,
        **_backward_schedule(d, block, blocks),
    )
    if bias is None or parts is None:
        return grad_qkv, qkv.new_zeros(0)
    return grad_qkv, parts.sum(0)[:, :n, :n].to(bias.dtype, copy=True)


@attention_backward.register_fake
def _(
    grad_out: Tensor, qkv: Tensor, bias: Tensor | None, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty(0) if bias is None else torch.empty_like(bias)


def _packed(qkv: Tensor) -> Tensor:
    h, d = qkv.shape[3:]
    return qkv if qkv.stride()[2:] == (h * d, d, 1) else qkv.contiguous()


def _padded(offset: Tensor | None, block: int) -> Tensor | None:
    """Bias or mask `[*, N, N]` in base 2, fp32, padded with -inf to whole tiles (so that rows are aligned)."""
    if offset is None:
        return None
    pad = -offset.shape[-1] % block
    return torch.nn.functional.pad(offset.float() * LOG2E, (0, pad, 0, pad), value=-math.inf)


def _plan(qkv: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
    """Grid (groups of sequences, heads, blocks), sequences per group and the constants of both kernels."""
    b, n, _, h, d = qkv.shape
    block = block_tokens(n, bias is not None, qkv.dtype)
    blocks = triton.cdiv(n, block)
    sequences = sequences_per_program(b, h, blocks, bias is not None)
    constants = {
        "HAS_BIAS": bias is not None,
        "HAS_MASK": mask is not None,
        "N": n,
        "D": d,
        "BLOCK": block,
        "BLOCKS": blocks,
        "PRECISION": _precision(qkv.dtype),
    }
    return (triton.cdiv(b, sequences), h, blocks), sequences, constants


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.bfloat16 and interpreted():
        return "upcast"
    return "ieee" if dtype == torch.float32 else "tf32"


def _backward_schedule(d: int, block: int, blocks: int) -> dict[str, int]:
    """Warps and pipeline stages under which no configuration spills on sm_80, sm_90 or sm_100 (`kernels.bench.aot`)."""
    if block == 16:
        warps, stages = 4, 1
    elif block == 32 and d < 64:
        warps, stages = 8, 2
    elif block == 32 or blocks > 1:
        warps, stages = 8, 1
    else:
        warps, stages = {16: (4, 2), 32: (8, 2), 64: (8, 3)}[d]
    if block == 64 and _on_hopper():
        # wgmma gives every four warps 64 rows: two groups of them would both compute the scores of the block
        warps = 4
    return {"num_warps": warps, "num_stages": stages}


def _on_hopper() -> bool:
    return not interpreted() and driver.active.get_current_target().arch // 10 == 9


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs, out, lse)


def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grad_qkv, grad_bias = attention_backward(grad_out, *ctx.saved_tensors)
    return grad_qkv, grad_bias if ctx.needs_input_grad[1] else None, None


attention.register_autograd(_backward, setup_context=_setup_context)
