"""Multi-head self-attention straight from the packed qkv projection.

Letters: B sequences, N tokens, h heads, d channels per head, W windows of an image (Swin).
"""

from contextlib import nullcontext

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.dispatch import use_triton


def attention(
    qkv: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    deterministic: bool = False,
    impl: str,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias + mask) v for every sequence and head.

    Differentiable in `qkv` and `bias`.

    Args:
        qkv: `[B, N, 3, h, d]`, the projection as it comes from the linear layer.
        bias: `[h, N, N]` relative-position bias.
        mask: `[W, N, N]` additive, without gradient; sequence b takes window b % W.
        deterministic: the backward pass gives the same bits every time ("triton" always does).
        impl: "eager" (torch's scaled_dot_product_attention, also "sdpa"), "triton", or "sdpa_above_N"; see `by_length`.

    Returns:
        `[B, N, h * d]` in the dtype of `qkv`.

    Raises:
        ValueError: shapes do not fit, or `impl` is unknown or cannot run here.
    """
    _check(qkv, bias, mask)
    triton = use_triton(by_length(impl, qkv.shape[1], biased=bias is not None or mask is not None), qkv)
    if triton:
        from kernels.fused.attention import HEAD_DIMS
        from kernels.fused.attention import attention as fused

        if qkv.shape[-1] not in HEAD_DIMS:
            raise ValueError(f"impl='triton' has head_dim {HEAD_DIMS}, got {qkv.shape[-1]}: use impl='eager'")
        out, _ = fused(qkv, None if bias is None else bias.contiguous(), None if mask is None else mask.contiguous())
        return out
    return _eager(qkv, bias, mask, deterministic)


def by_length(impl: str, tokens: int, *, biased: bool) -> str:
    """The implementation of sequences of so many tokens: "eager" or "triton", or what is neither as it is.

    "sdpa_above_N" leaves to torch what is longer than N and has neither bias nor mask: with either torch's fastest
    backend does not run, and so many programs for short sequences are what the kernel is for. Which N a card wants
    is what `python -m pipeline.bench gpu c` measures (docs/kernels.md).
    """
    if impl == "sdpa":
        return "eager"
    above = impl.removeprefix("sdpa_above_")
    if above == impl or not above.isdecimal():
        return impl
    return "eager" if tokens > int(above) and not biased else "triton"


def _eager(qkv: Tensor, bias: Tensor | None, mask: Tensor | None, deterministic: bool) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, h, N, d]
    # the other CUDA backends add up key and value gradients in any order
    backend = sdpa_kernel(SDPBackend.MATH) if deterministic and qkv.is_cuda else nullcontext()
    with backend:
        out = scaled_dot_product_attention(query, key, value, attn_mask=_scores_offset(qkv, bias, mask))
    return out.transpose(1, 2).flatten(2)


def _scores_offset(qkv: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """bias + mask `[B | 1, h | 1, N, N]` in the dtype of `qkv`."""
    offset = None if bias is None else bias[None]
    if mask is not None:
        windows = mask[:, None] if offset is None else offset + mask[:, None]
        offset = windows.repeat(qkv.shape[0] // mask.shape[0], 1, 1, 1)
    return None if offset is None else offset.to(qkv.dtype)


def _check(qkv: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: expected [B, N, 3, h, d], got {list(qkv.shape)}")
    batch, tokens, _, heads, _ = qkv.shape
    if bias is not None and bias.shape != (heads, tokens, tokens):
        raise ValueError(f"bias: expected {[heads, tokens, tokens]}, got {list(bias.shape)}")
    if mask is not None and (mask.ndim != 3 or mask.shape[1:] != (tokens, tokens) or batch % mask.shape[0]):
        raise ValueError(f"mask: expected [W, {tokens}, {tokens}] with W dividing {batch}, got {list(mask.shape)}")
