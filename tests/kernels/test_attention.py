"""Attention on the packed projection against fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, by_length

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, above: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output and gradients of qkv and bias, all arithmetic in `dtype`."""
    qkv = qkv.detach().to(dtype).requires_grad_()
    bias = None if bias is None else bias.detach().to(dtype).requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + mask.to(dtype).repeat(len(qkv) // len(mask), 1, 1)[:, None]
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    out.backward(above.to(dtype))
    assert qkv.grad is not None
    return out.detach(), qkv.grad, None if bias is None else bias.grad


def tensors(
    shape: tuple[int, int, int, int], windows: int | None, dtype: torch.dtype, device: str, with_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    b, n, h, d = shape
    generator = torch.Generator().manual_seed(n * d)
    qkv = torch.randn(b, n, 3, h, d, generator=generator).to(device, dtype)
    bias = torch.randn(h, n, n, generator=generator).to(device, dtype) if with_bias else None
    mask = None
    if windows:
        mask = torch.where(torch.rand(windows, n, n, generator=generator) < 0.3, -100.0, 0.0).to(device, dtype)
        mask.diagonal(dim1=1, dim2=2).zero_()
    return qkv, bias, mask, torch.randn(b, n, h * d, generator=generator).to(device, dtype)


def compare(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, above: Tensor, impl: str, earned: Callable[..., None]
) -> None:
    leaf = qkv.clone().requires_grad_()
    bias_leaf = None if bias is None else bias.clone().requires_grad_()
    out = attention(leaf, bias=bias_leaf, mask=mask, impl=impl)
    assert out.dtype == qkv.dtype
    out.backward(above)
    oracle = reference(qkv, bias, mask, above, torch.float64)
    plain = reference(qkv, bias, mask, above, qkv.dtype)
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    exponent = max(1.0, float((q @ k.mT).abs().max()) * q.shape[-1] ** -0.5)
    terms = qkv.shape[1] + qkv.shape[-1]  # a score is a sum over channels, an output and a gradient one over tokens
    earned(out.detach(), plain[0], oracle[0], exponent, terms)
    parts = 0.0
    if qkv.shape[1] == 1:  # a probability that is always 1: the gradient of its score is a product less itself
        products = above.double().view(*v.transpose(1, 2).shape).transpose(1, 2) * v
        parts = float(products.sum(-1).abs().max() * max(q.abs().max(), k.abs().max())) * q.shape[-1] ** -0.5
    earned(leaf.grad, plain[1], oracle[1], exponent, terms, parts)
    if bias_leaf is not None:  # summed over the sequences too
        earned(bias_leaf.grad, plain[2], oracle[2], exponent, terms + len(qkv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "with_bias", "windows"),
    [
        ((3, 37, 2, 64), False, None),
        ((4, 49, 3, 16), True, 2),
        ((2, 9, 3, 16), True, None),
        ((2, 65, 1, 32), False, None),
        ((2, 70, 2, 16), True, 2),
        ((2, 1, 1, 16), False, None),
        ((4, 36, 1, 32), False, 4),
    ],
    ids=str,
)
def test_output_and_gradients_match_fp64(
    shape: tuple[int, int, int, int],
    with_bias: bool,
    windows: int | None,
    dtype: torch.dtype,
    impl: str,
    device: str,
    earned: Callable[..., None],
) -> None:
    compare(*tensors(shape, windows, dtype, device, with_bias), impl, earned)


@pytest.mark.parametrize("tokens", [197, 257])
def test_images_of_224_pixels(tokens: int, impl: str, device: str, earned: Callable[..., None]) -> None:
    compare(*tensors((1, tokens, 1, 64), None, torch.bfloat16, device, False), impl, earned)


@pytest.mark.parametrize("tokens", [70, 197])
def test_all_queries_in_one_program(
    tokens: int, triton: str, device: str, monkeypatch: pytest.MonkeyPatch, earned: Callable[..., None]
) -> None:
    """As on a Hopper GPU."""
    from kernels.fused import attention as fused

    monkeypatch.setattr(fused, "_on_hopper", lambda: True)
    compare(*tensors((2, tokens, 2, 32), None, torch.float16, device, False), triton, earned)


@pytest.mark.parametrize("tokens", [20, 70])
def test_several_sequences_per_program(
    tokens: int, impl: str, device: str, monkeypatch: pytest.MonkeyPatch, earned: Callable[..., None]
) -> None:
    """6 sequences in groups of 4 and 2."""
    if impl == "triton":
        from kernels.fused import attention as fused

        monkeypatch.setattr(fused, "sequences_per_program", lambda *_: 4)
    compare(*tensors((6, tokens, 2, 16), 3, torch.float16, device, True), impl, earned)


def test_extreme_scores(impl: str, device: str, earned: Callable[..., None]) -> None:
    qkv, bias, mask, above = tensors((2, 37, 1, 32), None, torch.float32, device, False)
    compare(qkv * 12, bias, mask, above, impl, earned)


def test_identical_tokens_receive_their_mean_value(impl: str, device: str) -> None:
    qkv = torch.randn(2, 1, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(device).repeat(1, 41, 1, 1, 1)
    out = attention(qkv, impl=impl)
    torch.testing.assert_close(out, qkv[:, :, 2].flatten(2))


def test_mask_separates_tokens(impl: str, device: str) -> None:
    """With -inf between two groups of tokens the output is that of the groups alone."""
    qkv, _, _, _ = tensors((2, 30, 2, 16), None, torch.float32, device, False)
    group = torch.arange(30, device=device) < 13
    mask = torch.where(group[:, None] == group[None, :], 0.0, -torch.inf)[None]
    out = attention(qkv, mask=mask, impl=impl)
    torch.testing.assert_close(out[:, :13], attention(qkv[:, :13], impl=impl))
    torch.testing.assert_close(out[:, 13:], attention(qkv[:, 13:], impl=impl))


def test_sequences_in_a_larger_tensor(impl: str, device: str) -> None:
    """Crops of packed tokens are views; so are the first tokens of each sequence."""
    qkv, _, _, _ = tensors((4, 40, 2, 16), None, torch.float32, device, False)
    part = qkv[1:3, 2:31]
    torch.testing.assert_close(attention(part, impl=impl), attention(part.contiguous(), impl=impl), rtol=0, atol=0)


def test_no_sequences(impl: str, device: str) -> None:
    qkv = torch.zeros(0, 5, 3, 2, 16, device=device, requires_grad=True)
    out = attention(qkv, impl=impl)
    out.sum().backward()
    assert out.shape == (0, 5, 32)
    assert qkv.grad is not None


@pytest.mark.parametrize("tokens", [25, 70])
def test_deterministic_backward_repeats_its_bits(tokens: int, impl: str, device: str) -> None:
    qkv, bias, mask, above = tensors((4, tokens, 1, 16), 2, torch.float16, device, True)

    def gradients() -> tuple[Tensor, ...]:
        leaves = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
        out = attention(leaves[0], bias=leaves[1], mask=mask, deterministic=True, impl=impl)
        return torch.autograd.grad(out, leaves, above)

    for one, other in zip(gradients(), gradients(), strict=True):
        assert torch.equal(one, other)


def test_wrong_shapes_are_refused_with_the_expected_ones(impl: str, device: str) -> None:
    qkv, bias, mask, _ = tensors((4, 6, 2, 16), 2, torch.float32, device, True)
    with pytest.raises(ValueError, match=r"expected \[B, N, 3, h, d\], got \[4, 6, 3, 32\]"):
        attention(qkv.flatten(3), impl=impl)
    with pytest.raises(ValueError, match=r"bias: expected \[2, 6, 6\], got \[1, 6, 6\]"):
        attention(qkv, bias=bias[:1], impl=impl)
    with pytest.raises(ValueError, match=r"mask: expected \[W, 6, 6\] with W dividing 3, got \[2, 6, 6\]"):
        attention(qkv[:3], mask=mask, impl=impl)


def test_head_dim_without_a_kernel_is_refused(impl: str, device: str) -> None:
    qkv = torch.zeros(1, 4, 3, 1, 24, device=device)
    if impl == "eager":
        assert attention(qkv, impl=impl).shape == (1, 4, 24)
    else:
        with pytest.raises(ValueError, match=r"head_dim \(16, 32, 64\), got 24: use impl='eager'"):
            attention(qkv, impl=impl)


@pytest.mark.parametrize(
    ("word", "tokens", "biased", "chosen"),
    [
        ("sdpa_above_64", 64, False, "triton"),
        ("sdpa_above_64", 65, False, "eager"),
        ("sdpa_above_64", 65, True, "triton"),
        ("sdpa", 5, True, "eager"),
        ("eager", 5, False, "eager"),
        ("triton", 500, False, "triton"),
        ("sdpa_above_", 500, False, "sdpa_above_"),  # which is then refused
    ],
)
def test_the_rule_by_length_leaves_biases_and_short_sequences_to_triton(word, tokens, biased, chosen):
    assert by_length(word, tokens, biased=biased) == chosen


def test_attention_by_length_is_each_of_its_two_bit_for_bit(triton: str, device: str) -> None:
    short, long = (tensors((2, n, 2, 16), None, torch.float32, device, with_bias=False)[0] for n in (9, 10))
    attend = torch.compile(attention, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(attend(short, impl="sdpa_above_9"), attention(short, impl=triton))
    assert torch.equal(attend(long, impl="sdpa_above_9"), attention(long, impl="eager"))
    with pytest.raises(ValueError, match="impl='sdpa_above_' is unknown"):
        attention(short, impl="sdpa_above_")
