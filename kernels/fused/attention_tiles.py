"""Attention in tiles of up to 64 x 64 tokens, with bias and mask if there are any.

Sequences of one tile take all three gradients from one pass; longer ones make two passes over the blocks, one for keys
and values, one for queries. Programs of one sequence follow one another, so that the keys and values that they share
come from the cache: on an H200 that takes a fifth off the backward pass of 197 tokens.

Letters as in `kernels.fused.attention`.
"""

import triton
import triton.language as tl

from kernels.fused.reduce import LOWEST


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Product with fp32 accumulation. The interpreter would multiply the bits of bf16: there they become fp32 first."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def rows(base, i, stride, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of block i, channels of one head: [BLOCK, D], zeros behind the last token."""
    ns = i * BLOCK + tl.arange(0, BLOCK)
    return tl.load(base + ns[:, None] * stride + tl.arange(0, D)[None, :], mask=(ns < N)[:, None], other=0.0)


@triton.jit
def store_rows(base, i, stride, value, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write what `rows` reads."""
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

    `bias` is a tile, `mask` a pointer, both as `kernels.fused.attention` pads them.
    """
    scores = dot(q, tl.trans(k), PRECISION) * scale
    if HAS_BIAS:
        scores += bias
    if HAS_MASK:
        scores += tl.load(mask + _square(i, j, BLOCK, BLOCKS))
    if N % BLOCK != 0 and not HAS_BIAS and not HAS_MASK:
        scores = tl.where((j * BLOCK + tl.arange(0, BLOCK) < N)[None, :], scores, -float("inf"))
    return scores


@triton.jit(do_not_specialize=["B", "W", "sequences"])
def forward_kernel(
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
    head, i = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * sequences
    bias_head = bias + head * AREA if HAS_BIAS else bias
    tile = tl.zeros([BLOCK, BLOCK], tl.float32)
    if HAS_BIAS and BLOCKS == 1:
        tile = tl.load(bias_head + _square(i, i, BLOCK, BLOCKS))
    for b in range(first, tl.minimum(first + sequences, B)):
        query = qkv + tl.cast(b, tl.int64) * stride_b + head * D
        mask_window = mask + (b % W) * AREA if HAS_MASK else mask
        q = rows(query, i, stride_n, N, D, BLOCK)
        top = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, D], tl.float32)
        for j in range(BLOCKS):
            k = rows(query + width, j, stride_n, N, D, BLOCK)
            if HAS_BIAS and BLOCKS > 1:
                tile = tl.load(bias_head + _square(i, j, BLOCK, BLOCKS))
            s = _scores(q, k, i, j, tile, mask_window, scale, HAS_BIAS, HAS_MASK, N, BLOCK, BLOCKS, PRECISION)
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            v = rows(query + 2 * width, j, stride_n, N, D, BLOCK)
            acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, PRECISION)
            top = new_top
        ns = i * BLOCK + tl.arange(0, BLOCK)
        at = lse + (tl.cast(b, tl.int64) * tl.num_programs(0) + head) * N + ns
        tl.store(at, top + tl.log2(total), mask=ns < N)
        store_rows(out + tl.cast(b, tl.int64) * N * width + head * D, i, width, acc / total[:, None], N, D, BLOCK)


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
def row_products(out, i, stride, grad_out, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of output times gradient over channels [BLOCK]: what the softmax takes off each gradient of a score."""
    return tl.sum(rows(out, i, stride, N, D, BLOCK).to(tl.float32) * grad_out.to(tl.float32), 1)


@triton.jit(do_not_specialize=["B", "W", "sequences"])
def backward_kernel(
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
    head, i = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * sequences
    bias_head = bias + head * AREA if HAS_BIAS else bias
    bias_part = grad_bias
    tile = tl.zeros([BLOCK, BLOCK], tl.float32)
    bias_acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if HAS_BIAS:
        part = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + head
        bias_part = grad_bias + part * AREA
    for b in range(first, tl.minimum(first + sequences, B)):
        far = tl.cast(b, tl.int64)
        query = qkv + far * stride_b + head * D
        mask_window = mask + (b % W) * AREA if HAS_MASK else mask
        norm = lse + (far * tl.num_programs(0) + head) * N
        above = grad_out + far * N * width + head * D
        result = out + far * N * width + head * D
        target = grad_qkv + far * N * 3 * width + head * D

        k = rows(query + width, i, stride_n, N, D, BLOCK)
        v = rows(query + 2 * width, i, stride_n, N, D, BLOCK)
        grad_k = tl.zeros([BLOCK, D], tl.float32)
        grad_v = tl.zeros([BLOCK, D], tl.float32)
        for j in range(BLOCKS):
            q = rows(query, j, stride_n, N, D, BLOCK)
            do = rows(above, j, width, N, D, BLOCK)
            if HAS_BIAS:
                tile = tl.load(bias_head + _square(j, i, BLOCK, BLOCKS))
            p = _probabilities(
                q, k, j, i, norm, tile, mask_window, scale, HAS_BIAS, HAS_MASK, N, BLOCK, BLOCKS, PRECISION
            )
            grad_v += dot(tl.trans(p.to(do.dtype)), do, PRECISION)
            dp = dot(do, tl.trans(v), PRECISION)
            delta = tl.sum(p * dp, 1) if BLOCKS == 1 else row_products(result, j, width, do, N, D, BLOCK)
            ds = p * (dp - delta[:, None])
            if HAS_BIAS and BLOCKS == 1:
                bias_acc += ds
            if HAS_BIAS and BLOCKS > 1:
                # this program alone writes here
                tl.atomic_add(bias_part + _square(j, i, BLOCK, BLOCKS), ds, sem="relaxed")
            ds = ds.to(q.dtype)
            grad_k += dot(tl.trans(ds), q, PRECISION)
            if BLOCKS == 1:
                grad_q = dot(ds, k, PRECISION)
                store_rows(target, i, 3 * width, grad_q * (scale * ln2), N, D, BLOCK)
        store_rows(target + width, i, 3 * width, grad_k * (scale * ln2), N, D, BLOCK)
        store_rows(target + 2 * width, i, 3 * width, grad_v, N, D, BLOCK)

        if BLOCKS > 1:
            q = rows(query, i, stride_n, N, D, BLOCK)
            do = rows(above, i, width, N, D, BLOCK)
            delta = row_products(result, i, width, do, N, D, BLOCK)
            grad_q = tl.zeros([BLOCK, D], tl.float32)
            for j in range(BLOCKS):
                k = rows(query + width, j, stride_n, N, D, BLOCK)
                v = rows(query + 2 * width, j, stride_n, N, D, BLOCK)
                if HAS_BIAS:
                    tile = tl.load(bias_head + _square(i, j, BLOCK, BLOCKS))
                p = _probabilities(
                    q, k, i, j, norm, tile, mask_window, scale, HAS_BIAS, HAS_MASK, N, BLOCK, BLOCKS, PRECISION
                )
                dp = dot(do, tl.trans(v), PRECISION)
                ds = (p * (dp - delta[:, None])).to(k.dtype)
                grad_q += dot(ds, k, PRECISION)
            store_rows(target, i, 3 * width, grad_q * (scale * ln2), N, D, BLOCK)
    if HAS_BIAS and BLOCKS == 1:
        tl.store(bias_part + _square(i, i, BLOCK, BLOCKS), bias_acc)
