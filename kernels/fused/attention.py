"""Self-attention of short sequences, forward and backward, on the packed qkv projection without permutes or copies.

Sequences of up to 64 tokens, and all in fp32 or with a bias or a mask, are taken in tiles (`attention_tiles`), longer
ones by kernels of their own (`attention_long`), whose backward pass goes by tiles too where `_one_pass` does not hold.
No gradient is added up by atomics across programs: the result is the same bits every time.

Letters: B sequences, N tokens, H heads, D channels per head, W windows; i, j number blocks of tokens.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver

from kernels.dispatch import interpreted
from kernels.fused.attention_long import long_forward_kernel, one_pass_backward_kernel
from kernels.fused.attention_tiles import backward_kernel, forward_kernel
from kernels.fused.reduce import LN2, LOG2E

HEAD_DIMS = (16, 32, 64)
LONGEST_TILE = 64  # tokens
PROGRAMS = 2048
MOST_GROUPS = 65535  # the third side of a grid


def block_tokens(tokens: int, with_bias: bool, dtype: torch.dtype) -> int:
    """Tokens per block: up to 64, but smaller tiles for fp32 and for a bias gradient in several blocks."""
    limit = 32 if dtype == torch.float32 or (with_bias and tokens > LONGEST_TILE) else LONGEST_TILE
    return min(limit, max(16, triton.next_power_of_2(tokens)))


def sequences_per_program(batch: int, heads: int, blocks: int, with_bias: bool) -> int:
    """Sequences that one program takes in turn: enough programs to fill a GPU, few partial bias gradients."""
    few = min(max(batch * heads * blocks // PROGRAMS, 1), 64 if with_bias else 8)
    return max(few, triton.cdiv(batch, MOST_GROUPS))


@torch.library.custom_op("poa_kernels::attention", mutates_args=())
def attention(qkv: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H * D]` and base-2 log-sum-exp `[B, H, N]` fp32."""
    b, n, _, h, d = qkv.shape
    out, lse = qkv.new_empty(b, n, h * d), qkv.new_empty(b, h, n, dtype=torch.float32)
    if b == 0:
        return out, lse
    qkv = _packed(qkv)
    if _long(qkv, bias, mask):
        keys = 32 if _on_hopper() else 64  # 32 are 15% faster on an H200, and spill on sm_100
        long_forward_kernel[(b * h * triton.cdiv(n, LONGEST_TILE),)](
            *_placed(qkv),
            out,
            lse,
            LOG2E * d**-0.5,
            N=n,
            D=d,
            BLOCK=LONGEST_TILE,
            KEYS=keys,
            REST=max(16, triton.next_power_of_2(n % keys)),
            PRECISION=_precision(qkv.dtype),
            num_warps=4,
            num_stages=3,
        )
        return out, lse
    grid, sequences, constants = _plan(qkv, bias, mask)
    block = constants["BLOCK"]
    forward_kernel[grid](
        *_placed(qkv),
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
        num_stages=2 if bias is None else 3,
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
        return grad_qkv, qkv.new_empty(0) if bias is None else torch.zeros_like(bias)
    qkv, grad_out = _packed(qkv), grad_out.contiguous()
    if _long(qkv, bias, mask) and _one_pass(n):
        one_pass_backward_kernel[(b * h,)](
            grad_out,
            *_placed(qkv),
            out,
            lse,
            grad_qkv,
            LOG2E * d**-0.5,
            LN2,
            N=n,
            D=d,
            QUERIES=triton.next_power_of_2(n),
            KEYS=LONGEST_TILE,
            PRECISION=_precision(qkv.dtype),
            num_warps=8,
            num_stages=1,
        )
        return grad_qkv, qkv.new_empty(0)
    grid, sequences, constants = _plan(qkv, bias, mask)
    block, blocks = constants["BLOCK"], constants["BLOCKS"]
    parts = None
    if bias is not None:
        allocate = qkv.new_empty if blocks == 1 else qkv.new_zeros
        side = block * blocks
        parts = allocate(grid[2], h, side, side, dtype=torch.float32)
    backward_kernel[grid](
        grad_out,
        *_placed(qkv),
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
        return grad_qkv, qkv.new_empty(0)
    return grad_qkv, parts.sum(0)[:, :n, :n].to(bias.dtype, copy=True)


@attention_backward.register_fake
def _(
    grad_out: Tensor, qkv: Tensor, bias: Tensor | None, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty(0) if bias is None else torch.empty_like(bias)


def _packed(qkv: Tensor) -> Tensor:
    h, d = qkv.shape[3:]
    return qkv if qkv.stride()[2:] == (h * d, d, 1) else qkv.contiguous()


def _placed(qkv: Tensor) -> tuple[Tensor, int, int, int]:
    """Where the projection lies: itself, strides of sequences and tokens, channels of all heads."""
    return qkv, qkv.stride(0), qkv.stride(1), qkv.shape[3] * qkv.shape[4]


def _padded(offset: Tensor | None, block: int) -> Tensor | None:
    """Bias or mask `[*, N, N]` in base 2, fp32, padded with -inf to whole tiles (so that rows are aligned)."""
    if offset is None:
        return None
    pad = -offset.shape[-1] % block
    return torch.nn.functional.pad(offset.float() * LOG2E, (0, pad, 0, pad), value=-math.inf)


def _plan(qkv: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
    """Grid (heads, blocks, groups of sequences), sequences per group and the constants of both kernels."""
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
    return (h, blocks, triton.cdiv(b, sequences)), sequences, constants


def _long(qkv: Tensor, bias: Tensor | None, mask: Tensor | None) -> bool:
    """Whether `attention_long` is for these sequences."""
    return qkv.shape[1] > LONGEST_TILE and qkv.dtype != torch.float32 and bias is None and mask is None


def _one_pass(tokens: int) -> bool:
    """Whether all queries are one program's: up to 256 fit, and only a Hopper GPU was seen to gain by it."""
    return tokens <= 256 and _on_hopper()


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
        warps, stages = {16: (4, 2), 32: (8, 3), 64: (8, 3)}[d]
    if block == 64 and _on_hopper():
        # wgmma gives every four warps 64 rows: two groups of them would both compute the scores of the block
        warps, stages = 4, 3 if blocks == 1 else stages
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
