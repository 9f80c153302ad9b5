"""Attention of sequences that are longer than a tile and have neither bias nor mask.

Letters as in `kernels.fused.attention`.
"""

import triton
import triton.language as tl

from kernels.fused.attention_tiles import dot, row_products, rows, store_rows
from kernels.fused.reduce import LOWEST


@triton.jit
def _attend(
    q, key, j, stride, width, scale, top, total, acc, N: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over KEYS keys from `j` on; those behind the last one only unless WHOLE."""
    ns = j + tl.arange(0, KEYS)
    at = key + ns[:, None] * stride + tl.arange(0, D)[None, :]
    k = tl.load(at) if WHOLE else tl.load(at, mask=(ns < N)[:, None], other=0.0)
    s = dot(q, tl.trans(k), PRECISION)
    if not WHOLE:
        s = tl.where((ns < N)[None, :], s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    v = tl.load(at + width) if WHOLE else tl.load(at + width, mask=(ns < N)[:, None], other=0.0)
    acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, PRECISION)
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit
def long_forward_kernel(
    qkv, stride_b, stride_n, width, out, lse, scale, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK queries of one sequence and head; whole blocks of KEYS keys without a mask, then REST for what is left."""
    heads, blocks = width // D, tl.cdiv(N, BLOCK)
    at = tl.program_id(0)  # blocks of one head follow one another, so that its keys come from the cache
    i, head, b = at % blocks, (at // blocks) % heads, (at // (blocks * heads)).to(tl.int64)
    query = qkv + b * stride_b + head * D
    q = rows(query, i, stride_n, N, D, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for j in range(0, N // KEYS * KEYS, KEYS):
        top, total, acc = _attend(
            q, query + width, j, stride_n, width, scale, top, total, acc, N, D, KEYS, True, PRECISION
        )  # fmt: skip
    if N % KEYS != 0:
        top, total, acc = _attend(
            q, query + width, N // KEYS * KEYS, stride_n, width, scale, top, total, acc, N, D, REST, False, PRECISION
        )  # fmt: skip
    ns = i * BLOCK + tl.arange(0, BLOCK)
    tl.store(lse + (b * heads + head) * N + ns, top + tl.log2(total), mask=ns < N)
    store_rows(out + b * N * width + head * D, i, width, acc / total[:, None], N, D, BLOCK)


@triton.jit
def one_pass_backward_kernel(
    grad_out, qkv, stride_b, stride_n, width, out, lse, grad_qkv, scale, ln2, N: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All QUERIES of one sequence and head at once, the keys in blocks: five products where two passes take seven."""
    heads = width // D
    head, b = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    query = qkv + b * stride_b + head * D
    target = grad_qkv + b * N * 3 * width + head * D
    q = rows(query, 0, stride_n, N, D, QUERIES)
    above = rows(grad_out + b * N * width + head * D, 0, width, N, D, QUERIES)
    shift = row_products(out + b * N * width + head * D, 0, width, above, N, D, QUERIES)
    ns = tl.arange(0, QUERIES)
    norm = tl.load(lse + (b * heads + head) * N + ns, mask=ns < N, other=float("inf"))
    grad_q = tl.zeros([QUERIES, D], tl.float32)
    for j in range(tl.cdiv(N, KEYS)):
        k = rows(query + width, j, stride_n, N, D, KEYS)
        v = rows(query + 2 * width, j, stride_n, N, D, KEYS)
        s = dot(q, tl.trans(k), PRECISION) * scale
        if N % KEYS != 0:
            s = tl.where((j * KEYS + tl.arange(0, KEYS) < N)[None, :], s, -float("inf"))
        p = tl.exp2(s - norm[:, None])
        grad_v = dot(tl.trans(p.to(above.dtype)), above, PRECISION)
        ds = (p * (dot(above, tl.trans(v), PRECISION) - shift[:, None])).to(q.dtype)
        grad_k = dot(tl.trans(ds), q, PRECISION)
        grad_q += dot(ds, k, PRECISION)
        store_rows(target + width, j, 3 * width, grad_k * (scale * ln2), N, D, KEYS)
        store_rows(target + 2 * width, j, 3 * width, grad_v, N, D, KEYS)
    store_rows(target, 0, 3 * width, grad_q * (scale * ln2), N, D, QUERIES)
